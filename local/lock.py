"""The lock that one supervisor holds on a data directory for as long as it lives, however it ends."""

import fcntl
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import psutil

from local.errors import AlreadyRunningError, DataDirectoryError
from local.layout import Layout


@dataclass(frozen=True, slots=True)
class Holder:
    """The process that holds the lock. `pid` is None in the instant before it has written its own."""

    pid: int | None
    addresses: tuple[str, ...] = ()

    def __str__(self) -> str:
        where = f" at {', '.join(self.addresses)}" if self.addresses else ""
        return f"{where} (supervisor's pid {self.pid})" if self.pid else where


@contextmanager
def held(layout: Layout, addresses: Sequence[str] = (), within_s: float = 0.0) -> Iterator[None]:
    """Holds the lock, waiting for it at most `within_s`. Raises AlreadyRunningError."""
    try:
        descriptor = os.open(layout.lock, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise DataDirectoryError(f"{layout.lock}: {error.strerror}") from error
    try:
        deadline = time.monotonic() + within_s
        while not _acquire(descriptor):
            if time.monotonic() >= deadline:
                raise AlreadyRunningError(f"the cluster in {layout.root} already runs{_read(descriptor)}")
            time.sleep(0.05)  # flock has no timeout of its own.
        content = {"pid": os.getpid(), "created_at": psutil.Process().create_time(), "addresses": list(addresses)}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(content).encode(), 0)
        yield
    finally:
        os.close(descriptor)


def holder(layout: Layout) -> Holder | None:
    """Who holds the lock now; None when nobody does."""
    try:
        descriptor = os.open(layout.lock, os.O_RDWR)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataDirectoryError(f"{layout.lock}: {error.strerror}; are you the user who made this cluster?") from error
    try:
        return None if _acquire(descriptor) else _read(descriptor)
    finally:
        os.close(descriptor)


def _acquire(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read(descriptor: int) -> Holder:
    try:
        content = json.loads(os.pread(descriptor, 65536, 0))
        pid, created_at = int(content["pid"]), float(content["created_at"])
        addresses = tuple(map(str, content["addresses"]))
        # What a dead holder wrote stays until the next one writes: believe it only when the process is the same.
        same = abs(psutil.Process(pid).create_time() - created_at) < 1
    except (ValueError, KeyError, TypeError, psutil.Error):
        return Holder(None)
    return Holder(pid, addresses) if same else Holder(None)
