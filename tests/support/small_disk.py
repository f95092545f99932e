"""A PostgreSQL server's data on a disk of its own that is small, and can be filled. Linux, as root."""

import os
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.cluster import LocalCluster

# What an empty shard's data directory takes is about 60 MB, 16 MB of them the log.
_SIZE_MB = 160
_BALLAST = "ballast"
# Left free when it is full: the room of a page or two, so that what still fits is soon used up.
_LEFT_BYTES = 64 * 1024


@dataclass(frozen=True)
class SmallDisk:
    """A small file system that is a server's data directory."""

    path: Path

    def fill(self) -> None:
        """Takes all the room that is left."""
        found = os.statvfs(self.path)
        with (self.path / _BALLAST).open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, found.f_bavail * found.f_frsize - _LEFT_BYTES)

    def free(self) -> None:
        """Gives it back."""
        (self.path / _BALLAST).unlink(missing_ok=True)


def why_not() -> str:
    """Why no disk can be mounted here; empty when it can."""
    if os.geteuid() != 0:
        return "only root can mount a small disk"
    if shutil.which("mount") is None or shutil.which("umount") is None:
        return "there is no mount command"
    return ""


@asynccontextmanager
async def small_disk(cluster: LocalCluster, server: str) -> AsyncIterator[SmallDisk]:
    """Moves the data of a server of a running cluster to such a disk, and the cluster is started again.

    At the end the cluster is down and the disk gone, with what was on it.
    """
    await cluster.down()
    path = cluster.layout.pgdata(server)
    there, aside = path.stat(), path.with_name(path.name + ".aside")
    path.rename(aside)
    path.mkdir()
    options = f"size={_SIZE_MB}m,mode=700,uid={there.st_uid},gid={there.st_gid}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", path], check=True)
    try:
        subprocess.run(["cp", "-a", f"{aside}/.", path], check=True)
        await cluster.up()
        yield SmallDisk(path)
        await cluster.down()
    finally:
        # Lazily: should the cluster still run, it is `memshard down` of the cluster's own end that says so.
        subprocess.run(["umount", "--lazy", path], check=True)
