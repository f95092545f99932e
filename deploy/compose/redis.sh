#!/bin/sh
# Runs Redis as a cache: it stores nothing, and forgets the least used when it is full.
set -eu

umask 077
cat > /tmp/redis.conf <<END
port ${PORT:-6379}
requirepass $REDIS_PASSWORD
dir /tmp
save ""
appendonly no
maxmemory ${MAX_MEMORY:-256mb}
maxmemory-policy allkeys-lru
END
exec redis-server /tmp/redis.conf
