"""What a standby's own configuration says: whom it follows, by which name and slot. Pure.

It is in postgresql.auto.conf, which ALTER SYSTEM can change while the server runs. pg_basebackup and pg_rewind copy
that file from the other server, so it is written anew after each.
"""

import re

from common.roles import REPLICATION
from local.ports import HOST
from local.postgres import Server

# In the data directory: a password on the command line or in a setting could be seen by others.
PASSWORD_FILE = "memshard.pgpass"  # noqa: S105  # The file's name.

PRIMARY_CONNINFO = "primary_conninfo"
PRIMARY_SLOT_NAME = "primary_slot_name"
SYNCHRONOUS_STANDBY_NAMES = "synchronous_standby_names"

_OURS = (PRIMARY_CONNINFO, PRIMARY_SLOT_NAME, SYNCHRONOUS_STANDBY_NAMES)
_LINE = re.compile(rf"\s*({'|'.join(_OURS)})\b")
_CONNECT_TIMEOUT_S = 2


def slot_name(server_name: str) -> str:
    """The replication slot that a server follows through. Slots' names have no hyphens."""
    return server_name.replace("-", "_")


def conninfo(standby: Server, primary: Server) -> str:
    """How `standby` reaches `primary`. It streams under its own name."""
    values = {
        "host": HOST,
        "port": str(primary.port),
        "user": REPLICATION,
        "passfile": str(standby.pgdata / PASSWORD_FILE),
        "application_name": standby.name,
        "connect_timeout": str(_CONNECT_TIMEOUT_S),
        "sslmode": "disable",
        "gssencmode": "disable",
    }
    return " ".join(f"{name}={_quoted(value)}" for name, value in values.items())


def follows(text: str, primary: Server) -> bool:
    """Whether a conninfo of ours is one to `primary`."""
    return f" port='{primary.port}' " in text


def password_line(password: str) -> str:
    """The password file's content: for every server, since any of them may be the primary."""
    return f"{HOST}:*:*:{REPLICATION}:{password}\n"


def auto_conf(text: str, standby: Server, primary: Server | None) -> str:
    """postgresql.auto.conf of a server that follows `primary`, from what is in it: what others set stays.

    None: it follows nobody, and is about to be promoted; whom its commits are to wait for stays too.
    """
    ours = {
        PRIMARY_CONNINFO: conninfo(standby, primary) if primary else "",
        PRIMARY_SLOT_NAME: slot_name(standby.name) if primary else "",
    }
    if primary:
        ours[SYNCHRONOUS_STANDBY_NAMES] = ""
    kept = [line for line in text.splitlines() if not ((found := _LINE.match(line)) and found[1] in ours)]
    return "\n".join([*kept, *(f"{name} = {_setting(value)}" for name, value in ours.items())]) + "\n"


def _quoted(value: str) -> str:
    """A value of a conninfo."""
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _setting(value: str) -> str:
    """A value in a configuration file, where a backslash escapes too."""
    return "'" + value.replace("\\", "\\\\").replace("'", "''") + "'"
