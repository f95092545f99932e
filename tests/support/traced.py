"""A cluster whose traces are received here."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from tests.support.cluster import LocalCluster
from tests.support.otlp import OtlpReceiver


@asynccontextmanager
async def receiving_traces(cluster: LocalCluster, *, soon: bool = True) -> AsyncIterator[OtlpReceiver]:
    """Runs the cluster, all of whose processes send their traces to the receiver."""
    async with AsyncExitStack() as stack:
        receiver = await stack.enter_async_context(OtlpReceiver())
        with receiver.environment(soon=soon):
            await stack.enter_async_context(cluster)
        yield receiver
