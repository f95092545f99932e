#!/bin/sh
# Runs one PostgreSQL server, and makes its data directory when there is none: a primary's with initdb, a standby's as a
# copy of its primary. Begins as root, to own the volume, and goes on as the user POSTGRES_USER.
#   NAME                              cluster_name, by which shards know the servers of a sync set
#   PRIMARY                           host:port of the primary, for a standby
#   POSTGRES_PASSWORD                 the superuser's, for a new primary
#   MEMSHARD_REPLICATION_PASSWORD     for a standby
#   LISTEN, PORT                      where to listen: all addresses, 5432
set -eu

data=${PGDATA_DIRECTORY:-/var/lib/postgresql/data}
if [ "$(id -u)" = 0 ]; then
    user=${POSTGRES_USER:-postgres}
    mkdir -p "$data"
    chown "$user" "$data" && chmod 700 "$data"
    exec setpriv --reuid="$user" --regid="$user" --clear-groups --no-new-privs /bin/sh "$0"
fi

if [ ! -s "$data/PG_VERSION" ] && [ -z "${PRIMARY:-}" ]; then
    # The collation is PostgreSQL's own C.UTF-8: bytewise, the same in every release, and it knows the case of letters.
    printf '%s\n' "$POSTGRES_PASSWORD" | initdb --pgdata="$data" --username=postgres --pwfile=/dev/stdin \
        --auth=scram-sha-256 --encoding=UTF8 --locale=C --locale-provider=builtin --builtin-locale=C.UTF-8 \
        --data-checksums --no-instructions
    {
        echo "host all all all scram-sha-256"
        echo "host replication memshard_replication all scram-sha-256"
    } >> "$data/pg_hba.conf"
elif [ ! -s "$data/PG_VERSION" ]; then
    # A slot keeps for it on the primary what it has not got yet; one that is there is from an earlier attempt.
    slot=$(echo "$NAME" | tr - _)
    # The database is for the worker that keeps the standby's copies of logical slots.
    from="host=${PRIMARY%:*} port=${PRIMARY#*:} dbname=memshard user=memshard_replication"
    from="$from password=${MEMSHARD_REPLICATION_PASSWORD}"
    created=--create-slot
    until pg_basebackup --dbname="$from" --pgdata="$data" --write-recovery-conf --wal-method=stream --checkpoint=fast \
        --slot="$slot" $created --no-password; do
        find "$data" -mindepth 1 -delete
        created=$([ -z "$created" ] && echo --create-slot || true)
        sleep 1
    done
fi

unset POSTGRES_PASSWORD MEMSHARD_REPLICATION_PASSWORD
exec postgres -D "$data" -p "${PORT:-5432}" \
    -c "listen_addresses=${LISTEN:-*}" \
    -c unix_socket_directories= \
    -c "cluster_name=$NAME" \
    -c wal_level=logical \
    -c max_wal_senders=32 \
    -c max_replication_slots=32 \
    -c max_logical_replication_workers=20 \
    -c max_worker_processes=32 \
    -c max_active_replication_origins=32 \
    -c max_slot_wal_keep_size=4GB \
    -c hot_standby_feedback=on \
    -c max_standby_streaming_delay=2s \
    -c sync_replication_slots="$([ -n "${PRIMARY:-}" ] && echo on || echo off)" \
    -c wal_sender_timeout=10s \
    -c wal_receiver_timeout=10s \
    -c wal_receiver_status_interval=1s \
    -c jit=off \
    -c timezone=UTC \
    -c log_error_verbosity=terse \
    -c log_min_error_statement=panic \
    -c log_parameter_max_length=0 \
    -c log_parameter_max_length_on_error=0
