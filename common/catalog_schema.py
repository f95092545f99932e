"""The catalog's tables, as numbered migrations."""

from common.migrations import Migration

MIGRATIONS = (
    Migration(
        1,
        "cluster, shards, slots, epoch",
        """
        CREATE TABLE cluster (
            singleton boolean PRIMARY KEY DEFAULT true CHECK (singleton),
            cluster_id uuid NOT NULL,
            embedding_model text NOT NULL,
            dimensions int NOT NULL CHECK (dimensions > 0),
            precision text NOT NULL CHECK (precision IN ('half', 'single')),
            placement text NOT NULL CHECK (placement IN ('user_based')),
            token_key bytea NOT NULL CHECK (length(token_key) = 32),
            created_at timestamptz NOT NULL DEFAULT now()
        );
        CREATE TABLE topology (
            singleton boolean PRIMARY KEY DEFAULT true CHECK (singleton),
            epoch bigint NOT NULL
        );
        CREATE TABLE shards (
            shard_id text PRIMARY KEY,
            address text NOT NULL,
            weight int NOT NULL DEFAULT 1 CHECK (weight > 0),
            status text NOT NULL DEFAULT 'active'
                CHECK (status IN ('active', 'readonly', 'draining', 'maintenance'))
        );
        CREATE TABLE slot_ranges (
            first int PRIMARY KEY CHECK (first >= 0),
            last int NOT NULL CHECK (last >= first AND last < 16384),
            shard_id text NOT NULL REFERENCES shards
        );
        """,
    ),
    Migration(
        2,
        "placement strategies, language of keyword search",
        """
        ALTER TABLE cluster DROP CONSTRAINT cluster_placement_check;
        ALTER TABLE cluster ADD CONSTRAINT cluster_placement_check
            CHECK (placement IN ('user_based', 'content_hash', 'temporal', 'memory_type'));
        ALTER TABLE cluster ADD COLUMN text_language text NOT NULL DEFAULT 'english'
            CHECK (text_language ~ '^[a-z][a-z_]{0,62}$');
        """,
    ),
    Migration(
        3,
        "replicas, sync sets",
        """
        CREATE TABLE replicas (
            shard_id text NOT NULL REFERENCES shards,
            replica_id text NOT NULL,
            address text NOT NULL,
            PRIMARY KEY (shard_id, replica_id)
        );
        -- Which server takes a shard's writes, and which standbys its commits wait for (common/sync_set.py).
        CREATE TABLE sync_sets (
            shard_id text PRIMARY KEY REFERENCES shards,
            primary_server text NOT NULL,
            members text[] NOT NULL DEFAULT '{}',
            -- The set that is being changed to. Until it has replaced the other, a failover has to satisfy both.
            following text[],
            version bigint NOT NULL DEFAULT 1
        );
        """,
    ),
    Migration(
        4,
        "degradation levels set by operators",
        """
        CREATE TABLE levels (
            shard_id text PRIMARY KEY,  -- Empty: the cluster. So it refers to no shard.
            level text NOT NULL CHECK (level IN ('normal', 'reduced', 'essential', 'readonly', 'maintenance'))
        );
        """,
    ),
    Migration(
        5,
        "moves of slots, pins",
        """
        CREATE TABLE moves (
            move_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
            first int NOT NULL CHECK (first >= 0),
            last int NOT NULL CHECK (last >= first AND last < 16384),
            -- Not references: what has become of a move is known for longer than its shards are there.
            source text NOT NULL,
            target text NOT NULL CHECK (target <> source),
            step text NOT NULL,
            version bigint NOT NULL DEFAULT 1,
            attempts int NOT NULL DEFAULT 1,
            -- The timelines that both were on when it was last begun: a failover begins it again.
            source_timeline int NOT NULL DEFAULT 0,
            target_timeline int NOT NULL DEFAULT 0,
            rows bigint NOT NULL DEFAULT 0,
            fenced_at timestamptz,
            cutover_at timestamptz,
            cutover_epoch bigint NOT NULL DEFAULT 0,
            error text NOT NULL DEFAULT '',
            started_at timestamptz NOT NULL DEFAULT now(),
            changed_at timestamptz NOT NULL DEFAULT now(),
            -- A slot is moved by one move at a time.
            CONSTRAINT moves_apart EXCLUDE USING gist (int4range(first, last, '[]') WITH &&)
                WHERE (step NOT IN ('done', 'rolled_back'))
        );
        -- What stands in, on the target, for any position in the log of the source: by pair, the latest.
        CREATE TABLE cutovers (
            source text NOT NULL,
            target text NOT NULL,
            timeline int NOT NULL,
            lsn bigint NOT NULL,
            epoch bigint NOT NULL,
            PRIMARY KEY (source, target)
        );
        CREATE TABLE pins (
            slot int PRIMARY KEY CHECK (slot BETWEEN 0 AND 16383),
            shard_id text NOT NULL REFERENCES shards
        );
        """,
    ),
    Migration(
        6,
        "how long a move can be brought back",
        """
        -- The default is for moves that an older version made, or makes: what it waited for unless told otherwise.
        ALTER TABLE moves ADD COLUMN rollback_window_s double precision NOT NULL DEFAULT 30
            CHECK (rollback_window_s >= 0);
        """,
    ),
    Migration(
        7,
        "setting degradation levels, for roles that may do no more to the topology",
        """
        -- The epoch that has it; NULL, and nothing is done, when the topology is no longer at `planned`.
        CREATE FUNCTION set_level(planned bigint, whose text, wanted text) RETURNS bigint
        LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
        DECLARE
            raised bigint;
        BEGIN
            UPDATE topology SET epoch = epoch + 1 WHERE epoch = planned RETURNING epoch INTO raised;
            IF raised IS NULL THEN
                RETURN NULL;
            END IF;
            IF whose <> '' AND NOT EXISTS (SELECT FROM shards WHERE shard_id = whose) THEN
                RAISE no_data_found;
            END IF;
            DELETE FROM levels WHERE shard_id = whose;
            IF wanted IS NOT NULL THEN
                INSERT INTO levels (shard_id, level) VALUES (whose, wanted);
            END IF;
            PERFORM pg_notify('memshard_topology', raised::text);
            RETURN raised;
        END
        $$;
        REVOKE ALL ON FUNCTION set_level(bigint, text, text) FROM PUBLIC;
        """,
    ),
)
