"""The embedded cluster: PostgreSQL, Redis, shards and routers of one machine as supervised processes."""
