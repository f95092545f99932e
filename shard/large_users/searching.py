"""A search by the user's own index, or of everybody by the shared one, where that is there and as good as an exact one;
else an exact one.
"""

from common.postgres import Connection
from common.telemetry.registry import OWN_INDEX_SEARCHES
from memshard.internal.v1 import shard_pb2
from shard import reads
from shard.identity import Identity
from shard.large_users.known import OwnIndexes

_ANSWERED = {how: OWN_INDEX_SEARCHES.labels(how) for how in ("index", "exact")}


async def search(
    connection: Connection, identity: Identity, request: shard_pb2.SearchRequest, own_indexes: OwnIndexes
) -> shard_pb2.SearchResponse:
    """As `reads.search`, and sooner for large users and for everybody at once."""
    index = own_indexes.of(request.user_id) if request.user_id else own_indexes.shared
    if index is None or not request.embedding:
        return await reads.search(connection, identity, request)
    effort = index.effort(request.k, filtered=request.HasField("filter"), index_suffices=request.index_suffices)
    if effort is not None:
        found = await reads.search_index(
            connection, identity, request, index.key, candidates=effort.candidates, effort=effort.ef
        )
        if found is not None:
            _ANSWERED["index"].inc()
            return found
    _ANSWERED["exact"].inc()
    return await reads.search(connection, identity, request)
