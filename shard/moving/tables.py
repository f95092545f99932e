"""The tables whose rows belong to a user, and so move with their slot.

Every table of a shard is here or in `STAYING`; a test compares them with the schema, so that a new one cannot be
forgotten. The row filter is on the slot, which is part of each primary key and so of its replica identity.
"""

from dataclasses import dataclass

from common.postgres import Connection

MOVED = (
    "memories",
    "memory_versions",
    "applied_requests",
    "request_claims",
    "claims",
    "erasures",
    "erased_ids",
)
MARKS = "move_marks"
STREAM_PREFIX = "memshard_move_"
"""What the names of all publications, slots and subscriptions of moves begin with."""
STAYING = ("identity", "owned_slots", "departures", "heartbeats", "own_indexes", "schema_migrations")

# Generated columns are not replicated: each side makes its own.
_COLUMNS = """
SELECT attname AS name, format_type(atttypid, NULL) AS type, attnum = ANY (coalesce(indkey::int2[], '{}')) AS is_key
FROM pg_attribute
LEFT JOIN pg_index ON indrelid = attrelid AND indisprimary
WHERE attrelid = $1::text::regclass AND attnum > 0 AND NOT attisdropped AND attgenerated = ''
ORDER BY is_key DESC, array_position(indkey::int2[], attnum), attnum
"""
_VECTORS = ("halfvec", "vector")


@dataclass(frozen=True, slots=True)
class Table:
    """A table that moves: its key, and an expression that tells two versions of a row apart."""

    name: str
    key: tuple[str, ...]
    key_types: tuple[str, ...]
    fingerprint: str


async def describe(connection: Connection, name: str) -> Table:
    """What is to be known of one table to compare its rows. Names are the schema's own."""
    columns = await connection.fetch(_COLUMNS, name)
    key = [column for column in columns if column["is_key"]]
    rest = [column for column in columns if not column["is_key"]]
    texts = [_as_text(column["name"], column["type"]) for column in rest]
    fingerprint = f"md5(ROW({', '.join(texts)})::text)" if texts else "''"
    return Table(name, tuple(c["name"] for c in key), tuple(c["type"] for c in key), fingerprint)


def _as_text(column: str, kind: str) -> str:
    # As text, a vector of 1536 numbers takes longer than all the rest of the row together.
    if kind.rpartition(".")[2] in _VECTORS:
        return f"md5({kind.rpartition('.')[2]}_send({column}))"
    return column
