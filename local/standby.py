"""The data directory of a standby: whether it can be used as it is, and how it is made or made anew."""

import asyncio
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from common.roles import REPLICATION
from local import replication
from local.account import Account
from local.errors import LocalClusterError
from local.layout import sync_directory
from local.ports import HOST
from local.postgres import SUPERUSER, Server, run_program
from local.record import Secrets
from local.standby_settings import PASSWORD_FILE, auto_conf, password_line, slot_name

# Below this a copy takes about as long as finding out what differs.
REWIND_FROM_BYTES = 1024**3

_SIGNAL = "standby.signal"
_AUTO_CONF = "postgresql.auto.conf"
_NEW = ".new"
_OLD = ".old"


@dataclass(frozen=True, slots=True)
class Maker:
    """What it takes to make a standby."""

    binaries: Path
    account: Account | None
    secrets: Secrets
    log: logging.Logger

    async def remake(self, standby: Server, primary: Server) -> None:
        """Makes the directory of a standby that does not run, from its primary, which does. Raises LocalClusterError.

        A large one that was a server's before is brought back to where the two parted, others are copied.
        """
        await replication.drop_slots(primary, self.secrets, [slot_name(standby.name)])
        await replication.create_slots(primary, self.secrets, [slot_name(standby.name)])
        large = exists(standby.pgdata) and await asyncio.to_thread(_size_bytes, standby.pgdata) >= REWIND_FROM_BYTES
        if large:
            try:
                await self._rewind(standby, primary)
            except LocalClusterError as error:
                self.log.warning("%s could not be rewound, and is copied instead: %s", standby.name, error)
            else:
                return
        await self._copy(standby, primary)

    def write_settings(self, server: Server, primary: Server | None) -> None:
        """Makes a directory one of a standby that follows `primary`; None: nobody, it is about to be promoted."""
        self._write_settings(server, server.pgdata, primary)

    async def _rewind(self, standby: Server, primary: Server) -> None:
        # Should we be killed meanwhile, the directory is one that has to be made anew.
        (standby.pgdata / _SIGNAL).unlink(missing_ok=True)
        sync_directory(standby.pgdata)
        source = f"host={HOST} port={primary.port} user={SUPERUSER} dbname=postgres"
        command = [
            str(self.binaries / "pg_rewind"),
            f"--target-pgdata={standby.pgdata}",
            f"--source-server={source}",
        ]
        await run_program(command, standby.pgdata, self.account, variables={"PGPASSWORD": self.secrets.postgres})
        self.write_settings(standby, primary)

    async def _copy(self, standby: Server, primary: Server) -> None:
        new, old = (standby.pgdata.with_name(standby.pgdata.name + suffix) for suffix in (_NEW, _OLD))
        for directory in (new, old):
            await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)
        new.mkdir(mode=0o700)
        self._give(new)
        command = [
            str(self.binaries / "pg_basebackup"),
            f"--pgdata={new}",
            f"--host={HOST}",
            f"--port={primary.port}",
            f"--username={REPLICATION}",
            "--no-password",
            f"--slot={slot_name(standby.name)}",
            "--wal-method=stream",
            "--checkpoint=fast",
        ]
        await run_program(command, new, self.account, variables={"PGPASSWORD": self.secrets.memshard_replication})
        self._write_settings(standby, new, primary)
        if standby.pgdata.exists():
            standby.pgdata.rename(old)
        new.rename(standby.pgdata)
        sync_directory(standby.pgdata.parent)
        await asyncio.to_thread(shutil.rmtree, old, ignore_errors=True)

    def _write_settings(self, server: Server, directory: Path, primary: Server | None) -> None:
        settings = directory / _AUTO_CONF
        before = settings.read_text(encoding="utf-8") if settings.exists() else ""
        self._write(directory / PASSWORD_FILE, password_line(self.secrets.memshard_replication))
        self._write(settings, auto_conf(before, server, primary))
        self._write(directory / _SIGNAL, "")
        sync_directory(directory)

    def _write(self, path: Path, text: str) -> None:
        new = path.with_name(path.name + _NEW)
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(descriptor)
        self._give(new)
        os.replace(new, path)

    def _give(self, path: Path) -> None:
        if self.account is not None:
            os.chown(path, self.account.uid, self.account.gid)


def sweep(pgdata: Path) -> list[Path]:
    """Removes the copies that are left of a server when it was not made to the end; what was removed.

    They hold whole databases, with rows that have been erased since. Nothing may be at work on them.
    """
    copies = [copy for suffix in (_NEW, _OLD) if (copy := pgdata.with_name(pgdata.name + suffix)).exists()]
    for copy in copies:
        shutil.rmtree(copy, ignore_errors=True)
    return copies


def exists(pgdata: Path) -> bool:
    """Whether there is a server's data at all."""
    return (pgdata / "PG_VERSION").exists()


def is_standby(pgdata: Path) -> bool:
    """Whether the data is a standby's. Data of a server that was a primary cannot be used as a standby's as it is."""
    return exists(pgdata) and (pgdata / _SIGNAL).exists()


def _size_bytes(directory: Path) -> int:
    return sum(file.stat().st_size for file in _files(directory))


def _files(directory: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(directory):
        yield from (Path(parent, name) for name in names)
