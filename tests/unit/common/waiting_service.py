"""A service for the tests of `common.lifecycle`: `python -m tests.unit.common.waiting_service FOLDER`.

Its GetMemory puts a file `entered` into the folder and answers once there is a file `release`; DeleteMemory answers at
once. Settings come from the environment, as a router's.
"""

import asyncio
import sys
from pathlib import Path

from common import config, lifecycle
from common.config import RouterSettings
from common.deadline import Deadline
from common.rpc import methods_of
from memshard.v1 import memory_pb2 as pb

_SERVICE = pb.DESCRIPTOR.services_by_name["MemoryService"]


class _Servicer:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def GetMemory(self, request: pb.GetMemoryRequest, deadline: Deadline) -> pb.GetMemoryResponse:  # noqa: N802
        (self._folder / "entered").touch()
        while not (self._folder / "release").exists():
            await asyncio.sleep(0.01)
        return pb.GetMemoryResponse(memory=pb.Memory(id=request.id))

    async def DeleteMemory(  # noqa: N802
        self, request: pb.DeleteMemoryRequest, deadline: Deadline
    ) -> pb.DeleteMemoryResponse:
        return pb.DeleteMemoryResponse()


async def main(settings: RouterSettings) -> None:
    methods = methods_of(_SERVICE, _Servicer(Path(sys.argv[1])), default_deadline_s=60.0)
    server = lifecycle.Server(settings, [methods])
    await server.start()
    await server.set_serving(True)
    await server.run_until_stopped([_break_when_told])


async def _break_when_told() -> None:
    """A background task that fails once there is a file `break`."""
    while not (Path(sys.argv[1]) / "break").exists():
        await asyncio.sleep(0.01)
    raise RuntimeError("told to")


if __name__ == "__main__":
    lifecycle.run("waiting", lambda: config.load(RouterSettings), main)
