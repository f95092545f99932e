#!/bin/sh
# Makes what a cluster consists of beside its processes, or brings it up to date: run at each `docker compose up`.
#   CATALOG, SHARDS                   host:port of the catalog's server, and of each shard's primary
#   POSTGRES_PASSWORD, MEMSHARD_*_PASSWORD
set -eu

superuser="postgresql://postgres:${POSTGRES_PASSWORD}"
MEMSHARD_ADMIN_DSN="${superuser}@${CATALOG}/postgres" memshard database prepare catalog
for shard in ${SHARDS}; do
    MEMSHARD_ADMIN_DSN="${superuser}@${shard}/postgres" memshard database prepare shard
done
MEMSHARD_CATALOG_DSN="postgresql://memshard_owner:${MEMSHARD_OWNER_PASSWORD}@${CATALOG}/memshard_catalog" \
    memshard catalog create "${DESCRIPTION:-/memshard/cluster.yaml}"

token=/run/memshard/admin-token
if [ ! -s "$token" ]; then
    umask 077
    python -c 'import secrets; print(secrets.token_urlsafe(32))' > "$token.new"
    chown 10001:10001 "$token.new"
    mv "$token.new" "$token"
fi
