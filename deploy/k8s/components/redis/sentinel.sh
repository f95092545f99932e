#!/bin/sh
# Runs a Sentinel beside each Redis: two of three agree on a new master.
set -eu

self=$(hostname).memshard-redis-nodes
first=memshard-redis-0.memshard-redis-nodes
master=$(REDISCLI_AUTH=$REDIS_PASSWORD timeout 5 redis-cli -h memshard-redis-sentinel -p 26379 \
    sentinel get-master-addr-by-name memshard 2>/dev/null | head -n 1) || true

umask 077
cat > /data/sentinel.conf <<END
port 26379
dir /data
requirepass $REDIS_PASSWORD
sentinel resolve-hostnames yes
sentinel announce-hostnames yes
sentinel announce-ip $self
sentinel monitor memshard ${master:-$first} 6379 2
sentinel auth-pass memshard $REDIS_PASSWORD
sentinel sentinel-pass $REDIS_PASSWORD
sentinel down-after-milliseconds memshard 3000
sentinel failover-timeout memshard 10000
END
exec redis-server /data/sentinel.conf --sentinel
