"""The embedded cluster: PostgreSQL, Redis, shards and routers of one machine as supervised processes."""

import os

# Before any module here imports grpc: this process starts others while it uses gRPC, whose handlers for fork would only
# get in the way.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
