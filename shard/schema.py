"""The shard's tables, as numbered migrations. Types and sizes follow the cluster's dimensions and precision."""

from common.catalog import Cluster, Precision
from common.migrations import Migration

_VECTOR_TYPE = {Precision.HALF: "halfvec", Precision.SINGLE: "vector"}
_BYTES_PER_DIMENSION = {Precision.HALF: 2, Precision.SINGLE: 4}

# A PLAIN value must fit PostgreSQL's 8 KiB page together with the rest of its row (about 300 bytes once content and
# metadata have moved to TOAST); larger embeddings are stored out of line, uncompressed.
_PLAIN_MAX_BYTES = 7000
# PostgreSQL moves columns to TOAST until a row is below 2 KB, which a row with an embedding inside never is: all
# content would go, however short. The target leaves room for the embedding and a usual memory beside it.
_TOAST_ROOM_BYTES = 1024
_TOAST_TARGET_RANGE = (2040, 8160)


def vector_type(precision: Precision) -> str:
    """pgvector's name for embeddings of this precision."""
    return _VECTOR_TYPE[precision]


def migrations(cluster: Cluster) -> tuple[Migration, ...]:
    """The schema changes for a shard of `cluster`, in order."""
    vector_bytes = cluster.dimensions * _BYTES_PER_DIMENSION[cluster.precision]
    storage = "PLAIN" if vector_bytes <= _PLAIN_MAX_BYTES else "EXTERNAL"
    low, high = _TOAST_TARGET_RANGE
    toast_target = min(max(vector_bytes + _TOAST_ROOM_BYTES, low), high)
    # Numbers and names of this module only: nothing from outside goes into these statements.
    column = f"{vector_type(cluster.precision)}({cluster.dimensions:d})"
    return (
        Migration(
            1,
            "identity, ownership, memories, applied requests",
            f"""
            CREATE TABLE identity (
                singleton boolean PRIMARY KEY DEFAULT true CHECK (singleton),
                cluster_id uuid NOT NULL,
                shard_id text NOT NULL,
                embedding_model text NOT NULL,
                dimensions int NOT NULL,
                precision text NOT NULL,
                epoch bigint NOT NULL
            );
            -- A slot that the shard has never owned has no row. 'fenced': readable, takes no write.
            CREATE TABLE owned_slots (
                slot int PRIMARY KEY CHECK (slot BETWEEN 0 AND 16383),
                state text NOT NULL CHECK (state IN ('own', 'fenced', 'gone')),
                -- FOR SHARE asks for the right to update some column. This one says nothing, so that the serving role
                -- can hold a slot and not change who owns it.
                held boolean
            );
            CREATE TABLE memories (
                slot int NOT NULL,
                user_id text COLLATE "C" NOT NULL,
                id uuid NOT NULL,
                digest bytea NOT NULL,
                agent_id text NOT NULL,
                session_id text NOT NULL,
                type smallint NOT NULL,
                importance real NOT NULL,
                content text NOT NULL,
                metadata jsonb NOT NULL,
                embedding {column},
                embedding_model text NOT NULL,
                create_time timestamptz NOT NULL DEFAULT now(),
                update_time timestamptz NOT NULL DEFAULT now(),
                expire_time timestamptz,
                -- Set: a tombstone. The row stays, emptied, so that a late retry of its store finds the id taken.
                deleted_at timestamptz,
                version bigint NOT NULL DEFAULT 1,
                PRIMARY KEY (slot, user_id, id)
            ) WITH (toast_tuple_target = {toast_target:d});
            ALTER TABLE memories ALTER COLUMN embedding SET STORAGE {storage};
            CREATE INDEX memories_newest_first ON memories (slot, user_id, create_time DESC, id DESC)
                WHERE deleted_at IS NULL;
            CREATE INDEX memories_by_id ON memories (id);
            CREATE INDEX memories_expiring ON memories (expire_time)
                WHERE expire_time IS NOT NULL AND deleted_at IS NULL;
            CREATE INDEX memories_tombstones ON memories (deleted_at) WHERE deleted_at IS NOT NULL;
            CREATE TABLE applied_requests (
                slot int NOT NULL,
                user_id text COLLATE "C" NOT NULL,
                request_id text COLLATE "C" NOT NULL,
                digest bytea NOT NULL,
                outcome boolean NOT NULL,
                applied_at timestamptz NOT NULL DEFAULT now(),
                PRIMARY KEY (slot, user_id, request_id)
            );
            CREATE INDEX applied_requests_by_age ON applied_requests (applied_at);
            """,  # noqa: S608  # The numbers and names from above.
        ),
    )
