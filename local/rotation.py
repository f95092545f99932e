"""New passwords for a running cluster. Its processes keep the connections that they have; a restart of all of it gives
them the new ones.

The new passwords are written down before the first server learns of one. So a rotation that was cut off is finished by
the next, whichever servers have them already.
"""

from common import roles
from common.postgres import Connection
from common.roles import APP, MOVER, OWNER, REPLICATION, Login
from local import lock
from local.cluster import Plan
from local.errors import DataDirectoryError, LocalClusterError
from local.layout import Layout, write_atomically
from local.postgres import SUPERUSER, Server
from local.record import Secrets, load_record, load_secrets
from local.sessions import session

_TIMEOUT_S = 10.0
_IN_RECOVERY = "SELECT pg_is_in_recovery()"


async def rotate(layout: Layout) -> list[str]:
    """Gives every role of every server a new password, and Redis and the admin service new secrets for their next
    start; the names of the servers that took the passwords.

    Raises LocalClusterError; then nothing has changed for good, and it has to be run again.
    """
    if not layout.exists():
        raise DataDirectoryError(f"there is no cluster in {layout.root}")
    if lock.holder(layout) is None:
        raise LocalClusterError(f"the cluster in {layout.root} does not run: start it first")
    record, old = load_record(layout), load_secrets(layout)
    new = _planned(layout)
    plan = Plan(layout, record, old, ())
    changed = [await _change([plan.catalog_server()], old, new)]
    for shard_id in record.shard_ids():
        changed.append(await _change(list(plan.shard_servers(shard_id).values()), old, new))
    layout.next_secrets.replace(layout.secrets)
    # The next start makes one.
    layout.admin_token.unlink(missing_ok=True)
    return changed


def _planned(layout: Layout) -> Secrets:
    """The new passwords: those of a rotation that was cut off, if there was one."""
    if layout.next_secrets.exists():
        return Secrets.model_validate_json(layout.next_secrets.read_text(encoding="utf-8"))
    new = Secrets.generate()
    write_atomically(layout.next_secrets, new.model_dump_json(indent=2) + "\n", durable=True)
    return new


async def _change(servers: list[Server], old: Secrets, new: Secrets) -> str:
    """Changes the passwords on the one of these that takes writes; its name. Its standbys have them from there."""
    why = ""
    for server in servers:
        for known in (old, new):
            try:
                async with session(SUPERUSER, known.postgres, server, within_s=_TIMEOUT_S) as connection:
                    if await connection.fetchval(_IN_RECOVERY):
                        break
                    async with connection.transaction():
                        await _set_all(connection, new)
                    return server.name
            except LocalClusterError as error:
                why = str(error)
    raise LocalClusterError(f"the passwords could not be changed ({why or 'no server takes writes'}); try again")


async def _set_all(connection: Connection, new: Secrets) -> None:
    for login in (Login(OWNER, new.memshard_owner), Login(APP, new.memshard_app), Login(SUPERUSER, new.postgres)):
        await roles.ensure_login(connection, login)
    for login in (Login(REPLICATION, new.memshard_replication), Login(MOVER, new.memshard_mover)):
        if await roles.has_role(connection, login.role):
            await roles.ensure_login(connection, login)
