"""A search by the user's own index, where there is one and it is as good as an exact one; else an exact one."""

from common.postgres import Connection
from common.telemetry.registry import OWN_INDEX_SEARCHES
from memshard.internal.v1 import shard_pb2
from shard import reads
from shard.identity import Identity
from shard.large_users.known import OwnIndexes

_BY_INDEX, _EXACT = (OWN_INDEX_SEARCHES.labels(answered) for answered in ("index", "exact"))


async def search(
    connection: Connection, identity: Identity, request: shard_pb2.SearchRequest, own_indexes: OwnIndexes
) -> shard_pb2.SearchResponse:
    """As `reads.search`, and sooner for large users."""
    index = own_indexes.of(request.user_id) if request.embedding else None
    if index is None:
        return await reads.search(connection, identity, request)
    effort = index.effort(request.k, filtered=request.HasField("filter"), index_suffices=request.index_suffices)
    if effort is not None:
        found = await reads.search_index(
            connection, identity, request, index.key, candidates=effort.candidates, effort=effort.ef
        )
        if found is not None:
            _BY_INDEX.inc()
            return found
    _EXACT.inc()
    return await reads.search(connection, identity, request)
