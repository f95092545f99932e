"""The supervisor of a cluster that was started with `memshard up --detach`."""

import asyncio
import os
import sys

from local import up
from local.detach import PipeObserver, decode
from local.errors import LocalClusterError


def main(arguments: list[str]) -> int:
    """Runs the cluster that the arguments ask for (see detach.py) until a signal; returns the exit code."""
    request, descriptor = decode(arguments[0]), int(arguments[1])
    os.set_inheritable(descriptor, False)
    observer = PipeObserver(descriptor)
    try:
        asyncio.run(up.run(request, observer))
    except LocalClusterError as error:
        observer.failed(error)
        return 1
    except asyncio.CancelledError:
        return 1
    finally:
        observer.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
