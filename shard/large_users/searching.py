"""A search by the user's own index, where there is one and it is as good as an exact one; else an exact one.

The planner takes the index when the statement is planned for this user (a plan for everybody cannot prove the index's
predicate) and when it does not believe that sorting is cheaper, which it does of users whom its statistics do not know.
Both are settings of a transaction of its own, begun and ended with a message each.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from common.postgres import Connection
from common.telemetry.registry import OWN_INDEX_SEARCHES
from memshard.internal.v1 import shard_pb2
from shard import reads
from shard.identity import Identity
from shard.large_users.known import OwnIndexes

# A node that is switched off is still used where there is no other way, such as to put the results in order. PostgreSQL
# up to 17 counts it as so expensive that it would compile the statement (jit).
# Iterative scans go on where the first candidates were dead rows, or did not pass the filter.
_BEGIN = """
BEGIN READ ONLY;
SET LOCAL plan_cache_mode = force_custom_plan;
SET LOCAL enable_sort = off;
SET LOCAL jit = off;
SET LOCAL hnsw.iterative_scan = strict_order;
SET LOCAL hnsw.ef_search = {ef:d}
"""


async def search(
    connection: Connection, identity: Identity, request: shard_pb2.SearchRequest, own_indexes: OwnIndexes
) -> shard_pb2.SearchResponse:
    """As `reads.search`, and sooner for large users."""
    index = own_indexes.of(request.user_id) if request.embedding else None
    if index is None:
        return await reads.search(connection, identity, request)
    effort = index.effort(request.k, filtered=request.HasField("filter"), index_suffices=request.index_suffices)
    if effort is not None:
        async with by_index(connection, effort.ef):
            found = await reads.search_index(
                connection,
                identity,
                request,
                index.key,
                candidates=effort.candidates,
                filter_inside=effort.filter_inside,
            )
        if found is not None:
            OWN_INDEX_SEARCHES.labels("index").inc()
            return found
    OWN_INDEX_SEARCHES.labels("exact").inc()
    return await reads.search(connection, identity, request)


@asynccontextmanager
async def by_index(connection: Connection, ef: int) -> AsyncIterator[None]:
    """Statements within are planned to go by the user's own index."""
    await connection.execute(_BEGIN.format(ef=ef))
    try:
        yield
    except BaseException:
        await connection.execute("ROLLBACK")
        raise
    await connection.execute("COMMIT")
