"""Ports of the processes inside: below the range that outgoing connections take theirs from, and kept between runs."""

import os
import random
import socket
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path

from local.errors import PortInUseError

HOST = "127.0.0.1"

# Linux gives outgoing connections 32768 and up (ip_local_port_range).
FIRST, LAST = 20_000, 32_767

_TRIES = 1000
_UNPRIVILEGED = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")

_pick = random.SystemRandom().randint


def is_free(port: int) -> bool:
    """Whether a server could listen on `port` now. Connections of an earlier one, still closing, do not count."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def choose(
    names: Iterable[str],
    kept: Mapping[str, int],
    *,
    avoid: Collection[int] = (),
    free: Callable[[int], bool] = is_free,
    pick: Callable[[int, int], int] = _pick,
) -> dict[str, int]:
    """A port for each name: the kept one while nobody else has it, else a free one, at random because another cluster
    may be choosing at this moment.

    Raises PortInUseError when no free one was found.
    """
    chosen: dict[str, int] = {}
    taken = set(avoid)
    for name in names:
        port = kept.get(name)
        if port is None or port in taken or not free(port):
            candidates = (pick(FIRST, LAST) for _ in range(_TRIES))
            reserved = taken | set(kept.values())
            port = next((c for c in candidates if c not in reserved and free(c)), None)
        if port is None:
            raise PortInUseError(f"no free port between {FIRST} and {LAST} was found for {name}")
        chosen[name] = port
        taken.add(port)
    return chosen


def require_free(ports: Iterable[int], free: Callable[[int], bool] = is_free) -> None:
    """Raises PortInUseError when something listens on one of the routers' ports, or nobody may listen there."""
    for port in ports:
        if port < _first_unprivileged() and os.geteuid() != 0:
            raise PortInUseError(f"port {port} is for root only; choose one from {_first_unprivileged()} with --port")
        if not free(port):
            raise PortInUseError(f"port {port} is in use by something else; choose another with --port")


def _first_unprivileged() -> int:
    try:
        return int(_UNPRIVILEGED.read_text())
    except (OSError, ValueError):
        return 1024
