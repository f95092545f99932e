"""The user that PostgreSQL runs as. It refuses to run as root, so root's cluster runs it as a user of its own."""

import os
import pwd
import stat
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from local.errors import DataDirectoryError, LocalClusterError

# The name that the wheel uses too.
_NAME = "pgserver"
_USERADD = ("useradd", "--system", "--user-group", "--no-create-home", "--shell", "/usr/sbin/nologin", _NAME)


class _RunAs(TypedDict, total=False):
    user: int
    group: int
    extra_groups: list[int]


@dataclass(frozen=True, slots=True)
class Account:
    """A user of this machine."""

    name: str
    uid: int
    gid: int


def postgres_account() -> Account | None:
    """The user to run PostgreSQL as, made when missing; None is "ourselves", for everyone but root.

    Raises LocalClusterError.
    """
    if os.geteuid() != 0:
        return None
    found = _find()
    if found is None:
        try:
            subprocess.run(_USERADD, check=True, capture_output=True, text=True)  # noqa: S603  # A constant.
            error = ""
        except OSError as failure:
            error = failure.strerror or ""
        except subprocess.CalledProcessError as failure:
            error = failure.stderr.strip()
        found = _find()  # Another `up` may have made it in the meantime.
        if found is None:
            raise LocalClusterError(
                f"PostgreSQL does not run as root, and the user {_NAME} could not be made ({error}). "
                f"Make it (useradd --system {_NAME}), or run memshard as a plain user"
            )
    return found


def run_as(account: Account | None) -> _RunAs:
    """The arguments that make `subprocess` run a program as that user, with none of our groups; None: as ourselves."""
    return {"user": account.uid, "group": account.gid, "extra_groups": []} if account else {}


def make_traversable(directory: Path, account: Account | None) -> None:
    """Makes sure that `account` can pass through `directory`'s parents.

    Only below the system's temporary directory are modes changed; anywhere else they were somebody's choice.
    Raises DataDirectoryError.
    """
    if account is None:
        return
    temporary = Path(tempfile.gettempdir()).resolve()
    for parent in reversed(directory.parents):
        status = parent.stat()
        if _may_pass(status, account):
            continue
        if status.st_uid == os.geteuid() and temporary in parent.parents:
            parent.chmod(stat.S_IMODE(status.st_mode) | stat.S_IXOTH)
            continue
        raise DataDirectoryError(
            f"as root PostgreSQL runs as the user {account.name}, who may not pass through {parent}: choose another "
            "--data-dir, or run memshard as a plain user"
        )


def _may_pass(status: os.stat_result, account: Account) -> bool:
    if status.st_uid == account.uid:
        return bool(status.st_mode & stat.S_IXUSR)
    if status.st_gid == account.gid:
        return bool(status.st_mode & stat.S_IXGRP)
    return bool(status.st_mode & stat.S_IXOTH)


def _find() -> Account | None:
    try:
        entry = pwd.getpwnam(_NAME)
    except KeyError:
        return None
    return Account(entry.pw_name, entry.pw_uid, entry.pw_gid)
