"""The shard's tables, as numbered migrations. Types and sizes follow the cluster's dimensions and precision."""

from typing import Protocol

from common.catalog import PlacementStrategy, Precision
from common.migrations import Migration

VECTOR_TYPE = {Precision.HALF: "halfvec", Precision.SINGLE: "vector"}
_BYTES_PER_DIMENSION = {Precision.HALF: 2, Precision.SINGLE: 4}

# A PLAIN value must fit PostgreSQL's 8 KiB page together with the rest of its row (about 300 bytes once content and
# metadata have moved to TOAST); larger embeddings are stored out of line, uncompressed.
_PLAIN_MAX_BYTES = 7000
# PostgreSQL moves columns to TOAST until a row is below 2 KB, which a row with an embedding inside never is: all
# content would go, however short. The target leaves room for the embedding and a usual memory beside it.
_TOAST_ROOM_BYTES = 1024
_TOAST_TARGET_RANGE = (2040, 8160)


# For reads of one user in many slots, which is how all placements but user_based spread users.
_USER_INDEX = """
CREATE INDEX memories_of_user ON memories (user_id, create_time DESC, id DESC) WHERE deleted_at IS NULL;
"""


USER_KEY = "hashtextextended(user_id, 0)"
"""What the predicate of a large user's own index knows the user by (docs/decisions/0018-large-users.md)."""


def words_of(text: str) -> str:
    """The SQL expression whose words are searched, for a text expression of ours.

    Letters and digits with single spaces between: PostgreSQL's parser takes quadratic time over long runs of others,
    such as "a_a_a_…", looking for addresses and paths in them.
    """
    return f"regexp_replace({text}, '[^[:alnum:]]+', ' ', 'g')"


_ACROSS_SLOTS = Migration(
    3,
    "request ids of users in many slots, erased ids",
    """
    -- A request id belongs to its user; under placements that spread users, its effect may be in any slot
    -- (docs/decisions/0009-request-ids.md).
    CREATE TABLE request_claims (
        slot int NOT NULL,
        user_id text COLLATE "C" NOT NULL,
        request_id text COLLATE "C" NOT NULL,
        digest bytea NOT NULL,
        memory_slot int NOT NULL,
        attempts int NOT NULL DEFAULT 1,
        taken_at timestamptz NOT NULL DEFAULT now(),  -- By the last attempt.
        PRIMARY KEY (slot, user_id, request_id)
    );
    CREATE INDEX request_claims_by_age ON request_claims (taken_at);
    -- Ids whose memories are erased and which a cache may still know, of a user known by a hash.
    CREATE TABLE erased_ids (
        user_hash bytea NOT NULL,
        slot int NOT NULL,
        id uuid NOT NULL,
        erased_at timestamptz NOT NULL DEFAULT now(),
        PRIMARY KEY (user_hash, slot, id)
    );
    CREATE INDEX erased_ids_by_age ON erased_ids (erased_at);
    """,
)


# One row, written by the primary twice a second. A standby that has replayed it has all that was committed before it;
# its timeline is that of the primary that wrote it.
_HEARTBEATS = Migration(
    4,
    "heartbeats",
    """
    CREATE TABLE heartbeats (
        singleton boolean PRIMARY KEY DEFAULT true CHECK (singleton),
        timeline int NOT NULL,
        at timestamptz NOT NULL
    );
    """,
)


# What moves of slots leave behind (shard/moving): where slots went that this shard no longer has, and marks, which
# travel with the rows of a move and so tell how far it has come.
_MOVES = Migration(
    5,
    "moves of slots",
    """
    CREATE TABLE departures (
        departure_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        shard_id text NOT NULL,
        address text NOT NULL,
        epoch bigint NOT NULL,
        -- The place in the new owner's log at which it has all that was written here.
        timeline int NOT NULL,
        lsn bigint NOT NULL
    );
    -- No foreign key: it would be checked for each slot while nobody may write to them.
    ALTER TABLE owned_slots ADD COLUMN departure_id bigint;
    -- Room for the next state of each slot beside this one, so that no index has to be changed.
    ALTER TABLE owned_slots SET (fillfactor = 40);
    CREATE TABLE move_marks (
        slot int NOT NULL,
        move_id bigint NOT NULL,
        way text COLLATE "C" NOT NULL,
        mark bigint NOT NULL,
        PRIMARY KEY (slot, move_id, way)
    );
    """,
)


# The indexes that large users have of their own (shard/large_users). They are of this database alone: nothing of this
# moves with a slot.
_OWN_INDEXES = """
CREATE TABLE own_indexes (
    name text COLLATE "C" PRIMARY KEY,
    key bigint NOT NULL UNIQUE,
    user_hash bytea NOT NULL,
    -- The one slot of the user's memories; NULL where they are in many.
    slot int,
    -- With what hnsw.ef_search few and many results are what an exact search finds. NULL: with none, or not known.
    ef_few int,
    ef_many int,
    measured_rows bigint
);
"""
NEAREST_IN_INDEX = f"""
SELECT * FROM memories
WHERE user_id = for_user AND {USER_KEY} = for_key AND embedding IS NOT NULL AND deleted_at IS NULL
    AND (expire_time IS NULL OR expire_time > now())
ORDER BY embedding <=> query LIMIT candidates
"""  # noqa: S608
"""What `own_index_nearest` asks, with its parameters by name."""
NEAREST_IN_SHARED = """
SELECT * FROM memories
WHERE embedding IS NOT NULL AND deleted_at IS NULL AND slot >= 0 AND (expire_time IS NULL OR expire_time > now())
ORDER BY embedding <=> query LIMIT candidates
"""
"""The same of `shared_index_nearest`. That slots are not negative, which none is, is said nowhere else, so that nobody
else can be led to that index."""
INDEX_SETTINGS = {"plan_cache_mode": "force_custom_plan", "enable_sort": "off", "jit": "off"}
"""What it asks it with. Only a plan for these very values can use the index, and only without the alternative is it
used for a user whom statistics do not know. PostgreSQL up to 17 counts what is switched off as so dear that it would
compile the statement (jit)."""


# Writers hold the slots that they write to, many at a time, and do not queue behind whoever wants to change one: with
# enough of them there would never be a moment without. A lock on the table has a queue. Marks: see moving/streams.py.
_FENCE_SLOTS = Migration(
    8,
    "slots are fenced in one round trip",
    """
    -- Keeps everybody from writing to the slots, and sets a mark behind the last write, which it returns. It waits
    -- `patience_ms` for writes under way; for no slots at all, as in a rehearsal, it waits for nobody.
    CREATE FUNCTION fence_slots(
        first int, last int, for_move bigint, for_way text, given_mark bigint, patience_ms int
    ) RETURNS bigint LANGUAGE plpgsql AS $body$
    DECLARE
        slots int;
        set_mark bigint;
    BEGIN
        IF first <= last THEN
            PERFORM set_config('lock_timeout', patience_ms || 'ms', true);
            LOCK TABLE owned_slots IN EXCLUSIVE MODE;
        END IF;
        UPDATE owned_slots SET state = 'fenced' WHERE slot BETWEEN first AND last AND state = 'own';
        GET DIAGNOSTICS slots = ROW_COUNT;
        IF slots <> last - first + 1 THEN
            RAISE EXCEPTION 'there are only % of the slots % to %', slots, first, last;
        END IF;
        INSERT INTO move_marks AS known (slot, move_id, way, mark)
        SELECT first, for_move, for_way, given_mark WHERE first <= last
        ON CONFLICT (slot, move_id, way) DO UPDATE SET mark = greatest(excluded.mark, known.mark + 1)
        RETURNING mark INTO set_mark;
        RETURN set_mark;
    END
    $body$;
    """,
)


class Shape(Protocol):
    """What of a shard's identity its tables depend on."""

    @property
    def dimensions(self) -> int: ...
    @property
    def precision(self) -> Precision: ...
    @property
    def placement(self) -> PlacementStrategy: ...
    @property
    def text_language(self) -> str: ...


def migrations(shape: Shape) -> tuple[Migration, ...]:
    """The schema changes for a shard, in order. The text language must be the name of one that PostgreSQL has.

    Numbers and names of this module and the shape go into these statements; nothing from outside does.
    """
    return (
        _memories(shape),
        _whole_api(shape),
        _ACROSS_SLOTS,
        _HEARTBEATS,
        _MOVES,
        _own_indexes(shape),
        _shared_index(shape),
        _FENCE_SLOTS,
    )


def _memories(shape: Shape) -> Migration:
    vector_bytes = shape.dimensions * _BYTES_PER_DIMENSION[shape.precision]
    storage = "PLAIN" if vector_bytes <= _PLAIN_MAX_BYTES else "EXTERNAL"
    low, high = _TOAST_TARGET_RANGE
    toast_target = min(max(vector_bytes + _TOAST_ROOM_BYTES, low), high)
    column = f"{VECTOR_TYPE[shape.precision]}({shape.dimensions:d})"
    return Migration(
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
    )


def _own_indexes(shape: Shape) -> Migration:
    return Migration(
        6,
        "large users' own indexes",
        f"""
        {_OWN_INDEXES}
        -- The memories of a user nearest to `query` by the user's own index; without it the same by sorting.
        {_nearest("own_index_nearest", "for_user text, for_key bigint, ", shape, NEAREST_IN_INDEX)}
        """,
    )


def _shared_index(shape: Shape) -> Migration:
    return Migration(
        7,
        "an index of all memories, where it is asked for",
        f"""
        -- NULL: of all users. There is one of these at most, by its name.
        ALTER TABLE own_indexes ALTER COLUMN key DROP NOT NULL;
        {_nearest("shared_index_nearest", "", shape, NEAREST_IN_SHARED)}
        """,
    )


def _nearest(name: str, whose: str, shape: Shape, question: str) -> str:
    """A function that finds memories by an index. STABLE: it sees what the statement sees that it is part of. The two
    settings within concern nothing but such indexes, and last until the end of the transaction.
    """
    settings = " ".join(f"SET {setting} = {value}" for setting, value in INDEX_SETTINGS.items())
    return f"""
        CREATE FUNCTION {name}(
            {whose}query {VECTOR_TYPE[shape.precision]}, candidates int, effort int
        ) RETURNS SETOF memories LANGUAGE plpgsql STABLE ROWS 10 {settings} AS $body$
        BEGIN
            PERFORM set_config('hnsw.ef_search', effort::text, true),
                    set_config('hnsw.iterative_scan', 'strict_order', true);
            RETURN QUERY {question};
        END
        $body$;
        """


def _whole_api(shape: Shape) -> Migration:
    return Migration(
        2,
        "versions, keyword search, claims, erasures",
        f"""
        ALTER TABLE identity ADD COLUMN text_language text NOT NULL DEFAULT '{shape.text_language}';
        ALTER TABLE identity ADD COLUMN placement text NOT NULL DEFAULT '{shape.placement}';
        ALTER TABLE memories ADD COLUMN words tsvector
            GENERATED ALWAYS AS (to_tsvector('{shape.text_language}', {words_of("content")})) STORED;
        CREATE INDEX memories_words ON memories USING gin (words);
        CREATE INDEX memories_unembedded ON memories (slot, user_id)
            WHERE embedding IS NULL AND deleted_at IS NULL;
        CREATE INDEX memories_embedding_queue ON memories (create_time)
            WHERE embedding IS NULL AND deleted_at IS NULL;
        -- Statistics are samples of what users wrote, and would outlive it.
        ALTER TABLE memories ALTER COLUMN content SET STATISTICS 0, ALTER COLUMN metadata SET STATISTICS 0,
            ALTER COLUMN words SET STATISTICS 0, ALTER COLUMN agent_id SET STATISTICS 0,
            ALTER COLUMN session_id SET STATISTICS 0;
        {_USER_INDEX if shape.placement is not PlacementStrategy.USER_BASED else ""}
        -- What a memory was before an update, or before it was deleted: then without its contents.
        CREATE TABLE memory_versions (
            slot int NOT NULL,
            user_id text COLLATE "C" NOT NULL,
            id uuid NOT NULL,
            version bigint NOT NULL,
            agent_id text NOT NULL,
            session_id text NOT NULL,
            type smallint NOT NULL,
            importance real NOT NULL,
            content text NOT NULL,
            metadata jsonb NOT NULL,
            embedding_model text NOT NULL,
            pending boolean NOT NULL,
            create_time timestamptz NOT NULL,
            update_time timestamptz NOT NULL,
            expire_time timestamptz,
            replaced_at timestamptz NOT NULL DEFAULT now(),
            PRIMARY KEY (slot, user_id, id, version)
        );
        ALTER TABLE memory_versions ALTER COLUMN content SET STATISTICS 0, ALTER COLUMN metadata SET STATISTICS 0,
            ALTER COLUMN agent_id SET STATISTICS 0, ALTER COLUMN session_id SET STATISTICS 0;
        CREATE INDEX memory_versions_by_age ON memory_versions (replaced_at);
        -- The answer without content: a version's number leads to it.
        ALTER TABLE applied_requests ADD COLUMN answer jsonb;
        UPDATE applied_requests SET answer = jsonb_build_object('deleted', outcome);
        ALTER TABLE applied_requests ALTER COLUMN answer SET NOT NULL;
        ALTER TABLE applied_requests DROP COLUMN outcome;
        -- Who has an id, where that does not follow from the memory's own slot (docs/decisions/0007-claims.md).
        CREATE TABLE claims (
            slot int NOT NULL,
            user_id text COLLATE "C" NOT NULL,
            id uuid NOT NULL,
            digest bytea NOT NULL,
            memory_slot int NOT NULL,
            PRIMARY KEY (slot, user_id, id)
        );
        -- Requests to erase, known by a hash: nothing of the user is kept, not even the name.
        CREATE TABLE erasures (
            slot int NOT NULL,
            request_hash bytea NOT NULL,
            memories bigint NOT NULL,
            versions bigint NOT NULL,
            done boolean NOT NULL,
            applied_at timestamptz NOT NULL DEFAULT now(),
            PRIMARY KEY (slot, request_hash)
        );
        CREATE INDEX erasures_by_age ON erasures (applied_at);
        """,  # noqa: S608  # The names from above.
    )
