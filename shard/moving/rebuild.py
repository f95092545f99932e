"""Making a lost catalog again from what the shards say: who they are, what they own, and where slots went.

Each shard's own database is the authority on its slots. What a move had begun is ended: slots that were fenced at that
moment belong to one of the two that have all their rows, and what a move left behind is removed.
"""

import secrets
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

from common import postgres
from common.catalog import TOKEN_KEY_BYTES, CatalogError, Cluster
from common.catalog_restore import check_empty, restore
from common.config import MoverSettings
from common.postgres import CONNECT_ERRORS, Connection, explain
from common.slots import SLOT_COUNT, as_ranges
from common.sync_set import SyncSet
from common.topology import Cutover, Replica, Shard, SlotRange
from shard import identity
from shard.identity import Identity
from shard.moving.tables import MARKS, MOVED
from shard.primary import Newest, Primary

_FIND_TIMEOUT_S = 20.0
# The lost catalog had epochs that no shard heard of, as failovers raise it. Routers obey none older than theirs.
_EPOCHS_APART = 1_000_000
_BATCH = 1000

_READ = """
SELECT epoch, current_setting('cluster_name') AS server, ARRAY(SELECT slot FROM owned_slots WHERE state = 'own') AS own,
       ARRAY(SELECT slot FROM owned_slots WHERE state = 'fenced') AS fenced
FROM identity
"""
_CUTOVERS = """
SELECT DISTINCT ON (shard_id) shard_id, timeline, lsn FROM departures ORDER BY shard_id, timeline DESC, lsn DESC
"""
_OURS = "subname LIKE 'memshard\\_move\\_%'"
_ABANDON = f"""
SELECT string_agg(format('ALTER SUBSCRIPTION %1$I DISABLE; ALTER SUBSCRIPTION %1$I SET (slot_name = NONE);
                          DROP SUBSCRIPTION %1$I', subname), ';') FROM pg_subscription WHERE {_OURS}
"""  # noqa: S608  # A constant.
_END_SENDERS = """
SELECT pg_terminate_backend(active_pid, 5000) FROM pg_replication_slots
WHERE slot_type = 'logical' AND active_pid IS NOT NULL
    AND (slot_name LIKE 'memshard\\_move\\_%' OR slot_name LIKE 'pg\\_%\\_sync\\_%')
"""
_DROP_SLOTS = """
SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots
WHERE slot_type = 'logical' AND (slot_name LIKE 'memshard\\_move\\_%' OR slot_name LIKE 'pg\\_%\\_sync\\_%')
"""
_DROP_PUBLICATIONS = """
SELECT string_agg(format('DROP PUBLICATION %I', pubname), ';') FROM pg_publication
WHERE pubname LIKE 'memshard\\_move\\_%'
"""
_TAKE = "UPDATE owned_slots SET state = 'own', departure_id = NULL WHERE slot = ANY ($1::int[])"
_GIVE_UP = "UPDATE owned_slots SET state = 'gone' WHERE slot = ANY ($1::int[])"
_REMOVE = """
WITH removed AS (
    DELETE FROM {table} WHERE ctid = ANY (ARRAY(
        SELECT ctid FROM {table} WHERE NOT EXISTS (
            SELECT FROM owned_slots WHERE owned_slots.slot = {table}.slot AND state = 'own'
        ) LIMIT $1
    ))
    RETURNING 1
)
SELECT count(*) FROM removed
"""
# Standbys need not be there; what is written is what they, too, will have.
_SETTINGS = {"application_name": "memshard rebuild", "synchronous_commit": "local", "statement_timeout": "0"}


@dataclass(frozen=True, slots=True)
class Said:
    """What one shard says of itself."""

    known: Identity
    epoch: int
    server: str
    own: frozenset[int]
    fenced: frozenset[int]
    cutovers: tuple[Cutover, ...]


async def rebuild(
    settings: MoverSettings,
    shards: Sequence[tuple[str, str]],
    replicas: Sequence[tuple[str, str]],
    token_key: bytes | None,
) -> int:
    """Writes the catalog, which must be empty; its epoch. `shards` are (name, address), all that there are; `replicas`
    are (shard/name, address).

    Raises CatalogError: the shards do not make a cluster together, or a database cannot be reached.
    """
    token_key = secrets.token_bytes(TOKEN_KEY_BYTES) if token_key is None else token_key
    if len(token_key) != TOKEN_KEY_BYTES:
        raise CatalogError(f"a token key has {TOKEN_KEY_BYTES} bytes")
    async with AsyncExitStack() as stack:
        connections: dict[str, Connection] = {}
        for shard_id, _ in shards:
            connections[shard_id] = await _connect(stack, shard_id, settings.shard_dsn(shard_id))
        said = {shard_id: await _ask(shard_id, connection) for shard_id, connection in connections.items()}
        owners = owners_of(said)
        cluster = _cluster(said, token_key)
        catalog = await postgres.connect(settings.catalog_dsn.get_secret_value(), what="the catalog")
        stack.callback(catalog.terminate)
        # Before anything is removed: the moves of a catalog that is there are under way.
        await check_empty(catalog)
        await _end_moves(connections, owners)
        return await restore(
            catalog,
            cluster,
            max(one.epoch for one in said.values()) + _EPOCHS_APART,
            [
                Shard(shard_id, address, replicas=tuple(_replicas_of(shard_id, replicas)))
                for shard_id, address in shards
            ],
            [SlotRange(first, last, owners[first]) for first, last in _ranges(owners)],
            [cutover for one in said.values() for cutover in one.cutovers],
            {name: SyncSet(one.server, frozenset()) for name, one in said.items() if one.server},
        )


def owners_of(said: Mapping[str, Said]) -> dict[int, str]:
    """Who has each slot. Raises CatalogError when one has none, or two that take writes to it."""
    owners: dict[int, str] = {}
    for shard_id, one in said.items():
        for slot in one.own:
            if slot in owners:
                raise CatalogError(f"slot {slot} belongs to {owners[slot]} and to {shard_id}, by what they say")
            owners[slot] = shard_id
    # In the middle of a hand-over both have all the rows, and neither takes writes. Either will do.
    for shard_id in sorted(said):
        for slot in said[shard_id].fenced:
            owners.setdefault(slot, shard_id)
    missing = [slot for slot in range(SLOT_COUNT) if slot not in owners]
    if missing:
        ranges = ", ".join(f"{first}-{last}" for first, last in as_ranges(missing)[:5])
        raise CatalogError(f"no shard that was named has the slots {ranges}; name every shard that there is")
    return owners


async def _connect(stack: AsyncExitStack, shard_id: str, dsn: str) -> Connection:
    primary = Primary(dsn, Newest())
    try:
        await primary.find(_FIND_TIMEOUT_S)
        connection = await primary.connect(server_settings=_SETTINGS)
    except CONNECT_ERRORS as error:
        raise CatalogError(f"the database of {shard_id} cannot be reached: {explain(error)}") from error
    stack.callback(connection.terminate)
    return connection


async def _ask(shard_id: str, connection: Connection) -> Said:
    known = await identity.read(connection)
    if known is None or known.shard_id != shard_id:
        raise CatalogError(f"the database given for {shard_id} belongs to {known.shard_id if known else 'nobody'}")
    row = await connection.fetchrow(_READ)
    assert row is not None
    cutovers = await connection.fetch(_CUTOVERS)
    return Said(
        known,
        row["epoch"],
        row["server"],
        frozenset(row["own"]),
        frozenset(row["fenced"]),
        tuple(Cutover(shard_id, gone["shard_id"], gone["timeline"], gone["lsn"]) for gone in cutovers),
    )


def _cluster(said: Mapping[str, Said], token_key: bytes) -> Cluster:
    """What all shards say of their cluster. Raises CatalogError when they do not agree."""
    fixed = {
        (
            one.known.cluster_id,
            one.known.embedding_model,
            one.known.dimensions,
            one.known.precision,
            one.known.placement,
            one.known.text_language,
        )
        for one in said.values()
    }
    if len(fixed) != 1:
        raise CatalogError("the shards are not of one cluster, or were made with different settings")
    return Cluster(*fixed.pop(), token_key)


async def _end_moves(connections: Mapping[str, Connection], owners: Mapping[int, str]) -> None:
    """Removes what moves left behind: first all that replicates, everywhere, and only then rows."""
    for connection in connections.values():
        if statement := await connection.fetchval(_ABANDON):
            await connection.execute(statement)
    for connection in connections.values():
        await connection.fetch(_END_SENDERS)
        await connection.fetch(_DROP_SLOTS)
        if statement := await connection.fetchval(_DROP_PUBLICATIONS):
            await connection.execute(statement)
    for shard_id, connection in connections.items():
        ours = [slot for slot, owner in owners.items() if owner == shard_id]
        others = [slot for slot, owner in owners.items() if owner != shard_id]
        async with connection.transaction():
            await connection.execute(_TAKE, ours)
            await connection.execute(_GIVE_UP, others)
        for table in (*MOVED, MARKS):
            while await connection.fetchval(_REMOVE.format(table=table), _BATCH) >= _BATCH:
                pass


def _ranges(owners: Mapping[int, str]) -> list[tuple[int, int]]:
    return sorted(
        found
        for shard_id in set(owners.values())
        for found in as_ranges(slot for slot, owner in owners.items() if owner == shard_id)
    )


def _replicas_of(shard_id: str, replicas: Sequence[tuple[str, str]]) -> list[Replica]:
    return [Replica(name.partition("/")[2], at) for name, at in replicas if name.partition("/")[0] == shard_id]
