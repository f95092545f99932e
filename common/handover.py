"""A port that changes hands without a gap: a successor listens on it while its predecessor still does.

With SO_REUSEPORT several sockets listen on one port, if all of them ask for it and belong to one account; the kernel
spreads new connections over them (socket(7); M. Kerrisk, "The SO_REUSEPORT socket option", LWN, 2013). A server has to
ask for it from its start, as its successor could not listen otherwise. Then a second server that was started by mistake
could listen too, and take half of the calls in silence: a start that is no handover claims the port first.
"""

import errno
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress


@contextmanager
def claimed(host: str, port: int) -> Iterator[None]:
    """Listens on a port alone, so that within nobody but sockets with SO_REUSEPORT can come to it.

    Raises OSError when somebody listens on it already, with SO_REUSEPORT or without. Whatever else may be wrong with
    the address is left to whoever listens on it in earnest.
    """
    with ExitStack() as stack:
        for family, address in _addresses(host, port):
            try:
                stack.enter_context(_alone(family, address))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    raise
        yield


def _addresses(host: str, port: int) -> list[tuple[int, tuple[str, int] | tuple[str, int, int, int]]]:
    with suppress(OSError):
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        return [(family, address) for family, _, _, _, address in found]  # type: ignore[misc]  # Of IP alone.
    return []


@contextmanager
def _alone(family: int, address: tuple[str, int] | tuple[str, int, int, int]) -> Iterator[None]:
    with socket.socket(family) as claim:
        # As gRPC does: connections of an earlier server that are still closing are no obstacle.
        claim.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        claim.bind(address)
        # Two sockets that are only bound do not exclude each other.
        claim.listen(0)
        # From here on it lets gRPC's socket come beside it; and no other claim, which does not ask for it in time.
        claim.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        yield
