#!/bin/sh
# Runs Redis as a cache: as what Sentinel says that it is or, when nobody has said anything yet, the first as master.
set -eu

self=$(hostname).memshard-redis-nodes
first=memshard-redis-0.memshard-redis-nodes
master=$(REDISCLI_AUTH=$REDIS_PASSWORD timeout 5 redis-cli -h memshard-redis-sentinel -p 26379 \
    sentinel get-master-addr-by-name memshard 2>/dev/null | head -n 1) || true
master=${master:-$first}

umask 077
cat > /data/redis.conf <<END
port 6379
dir /data
requirepass $REDIS_PASSWORD
masterauth $REDIS_PASSWORD
replica-announce-ip $self
save ""
appendonly no
maxmemory ${MAX_MEMORY:-256mb}
maxmemory-policy allkeys-lru
END
if [ "$master" != "$self" ]; then
    echo "replicaof $master 6379" >> /data/redis.conf
fi
exec redis-server /data/redis.conf
