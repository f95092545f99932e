"""The embedded PostgreSQL servers: making a data directory, the server's command, addresses of its databases."""

import asyncio
import os
import shutil
import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from common.roles import APP, OWNER
from local.account import Account, run_as
from local.errors import LocalClusterError
from local.layout import sync_directory
from local.ports import HOST
from local.record import Secrets

SUPERUSER = "postgres"

# Written to postgresql.conf once, for whoever runs the cluster to tune.
_TUNABLE = {
    "max_connections": "100",
    "shared_buffers": "128MB",
    # Queries here take milliseconds; compiling them takes longer.
    "jit": "off",
    "log_checkpoints": "off",
    "timezone": "UTC",
    "log_timezone": "UTC",
}

# What the cluster relies on. On the command line, where neither an edited file nor a copied one overrides it.
_FIXED = {
    "listen_addresses": HOST,
    # A path below a data directory can be longer than the 107 bytes that a socket's address holds.
    "unix_socket_directories": "",
    "wal_level": "logical",
    # Eight standbys, each with room for a connection that is dying and one that makes it anew, and moves of slots.
    "max_wal_senders": "32",
    "max_replication_slots": "32",
    # Moves of slots: for each, one process that applies what comes, and two more while it copies.
    "max_logical_replication_workers": "20",
    "max_worker_processes": "32",
    "max_active_replication_origins": "32",
    # A standby that stays away is made anew; it must not fill the primary's disk.
    "max_slot_wal_keep_size": "1GB",
    # What the other standbys still need after a failover: the new primary had no slots for them before.
    "wal_keep_size": "64MB",
    # Both ends are processes of one machine: one that says nothing for this long is frozen.
    "wal_sender_timeout": "5s",
    "wal_receiver_timeout": "5s",
    "wal_receiver_status_interval": "1s",
    "wal_retrieve_retry_interval": "200ms",
    "hot_standby": "on",
    # Standbys serve reads: the primary keeps the rows that these still see.
    "hot_standby_feedback": "on",
    # What a read may hold up the replay for, when the primary had to lock a whole table.
    "max_standby_streaming_delay": "2s",
    # What is replayed after a crash is at most what five minutes wrote.
    "checkpoint_timeout": "5min",
    "fsync": "on",
    "full_page_writes": "on",
    "password_encryption": "scram-sha-256",
    # The supervisor's redirection is the log.
    "logging_collector": "off",
    "log_destination": "stderr",
    # What is remembered must not be in logs: no statements, no parameters, no DETAIL with a row's values.
    "log_error_verbosity": "terse",
    "log_statement": "none",
    "log_min_error_statement": "panic",
    "log_min_duration_statement": "-1",
    "log_parameter_max_length": "0",
    "log_parameter_max_length_on_error": "0",
}

_NEW = ".new"
_INITDB_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Server:
    """One PostgreSQL server of the cluster."""

    name: str
    pgdata: Path
    port: int
    database: str

    def dsn(self, role: str, password: str, database: str | None = None) -> str:
        """URL of its database (or of another one) as `role`."""
        return f"postgresql://{role}:{password}@{HOST}:{self.port}/{database or self.database}"

    def app_dsn(self, secrets: Secrets) -> str:
        """URL as the role that reads and writes rows."""
        return self.dsn(APP, secrets.memshard_app)

    def owner_dsn(self, secrets: Secrets) -> str:
        """URL as the role that owns the schema."""
        return self.dsn(OWNER, secrets.memshard_owner)

    def command(self, binaries: Path) -> tuple[str, ...]:
        """The command that runs it in the foreground."""
        settings = [part for name, value in _FIXED.items() for part in ("-c", f"{name}={value}")]
        # Its services ask for it: it tells the servers of a shard apart, whatever their roles.
        name = ("-c", f"cluster_name={self.name}")
        return (str(binaries / "postgres"), "-D", str(self.pgdata), "-p", str(self.port), *name, *settings)


def dsn_of_primary(servers: Sequence[Server], role: str, password: str) -> str:
    """URL of a shard's database on whichever of its servers takes writes."""
    hosts = ",".join(f"{HOST}:{server.port}" for server in servers)
    attributes = "?target_session_attrs=read-write" if len(servers) > 1 else ""
    return f"postgresql://{role}:{password}@{hosts}/{servers[0].database}{attributes}"


def environment() -> dict[str, str]:
    """PostgreSQL's environment: nothing of ours, so that no PG* variable of the person's reaches it."""
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    # With TZ given, initdb does not try every time zone there is.
    return {**kept, "LC_ALL": "C", "TZ": "UTC"}


async def initialise(server: Server, binaries: Path, account: Account | None, superuser_password: str) -> None:
    """Makes the server's data directory, which appears under its name only when it is complete.

    The collation is PostgreSQL's own C.UTF-8: bytewise like C, and it knows the case of all letters, so that a search
    for a word finds it at the start of a sentence in any alphabet. Raises LocalClusterError.
    """
    new = server.pgdata.with_name(server.pgdata.name + _NEW)
    password_file = new.with_name(new.name + ".password")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(mode=0o700)
    password_file.touch(mode=0o600)
    password_file.write_text(superuser_password + "\n", encoding="utf-8")
    try:
        if account is not None:
            os.chown(new, account.uid, account.gid)
            os.chown(password_file, account.uid, account.gid)
        await _initdb(new, password_file, binaries, account)
    finally:
        password_file.unlink()
    new.rename(server.pgdata)
    sync_directory(server.pgdata.parent)


async def _initdb(pgdata: Path, password_file: Path, binaries: Path, account: Account | None) -> None:
    tunable = [part for name, value in _TUNABLE.items() for part in ("-c", f"{name}={value}")]
    command = [
        str(binaries / "initdb"),
        f"--pgdata={pgdata}",
        f"--username={SUPERUSER}",
        f"--pwfile={password_file}",
        "--auth=scram-sha-256",
        "--encoding=UTF8",
        "--locale=C",
        "--locale-provider=builtin",
        "--builtin-locale=C.UTF-8",
        "--data-checksums",
        "--no-instructions",
        *tunable,
    ]
    await run_program(command, pgdata, account, timeout_s=_INITDB_TIMEOUT_S)


async def run_program(
    command: Sequence[str],
    cwd: Path,
    account: Account | None,
    *,
    timeout_s: float | None = None,
    variables: Mapping[str, str] | None = None,
) -> str:
    """Runs one of PostgreSQL's programs to its end, which comes early when the caller is cancelled; what it printed.

    `cwd` is a directory of the server that it works for, by which leftovers.py knows it. Raises LocalClusterError.
    """
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        cwd=cwd,
        env={**environment(), **(variables or {})},
        start_new_session=True,
        **run_as(account),
    )
    try:
        async with asyncio.timeout(timeout_s):
            output, _ = await process.communicate()
    except BaseException:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.communicate()
        raise
    text = output.decode(errors="replace").strip()
    if process.returncode != 0:
        raise LocalClusterError(f"{Path(command[0]).name} failed in {cwd}: {text[-2000:]}")
    return text
