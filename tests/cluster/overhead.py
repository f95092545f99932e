"""What metrics and traces cost: searches a second with them ÷ without, on two clusters side by side.

    python -m tests.cluster.overhead

One cluster is as `memshard up` makes it, with a trace of every tenth call sent to a receiver and its metrics read every
five seconds; in the other nothing is counted or traced at all. The same callers search one and the other in turn, so
that what else the machine does falls on both. Most of a search is the database's work, so there is little of that here:
few memories, which make what is measured look dearer than it is.
"""

import asyncio
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import replace
from os import environ
from pathlib import Path

from local.cluster import metrics_of
from tests.support.cluster import LocalCluster
from tests.support.eventually import eventually
from tests.support.generator import OK, Plan, generating, result_file
from tests.support.metrics import families_of, page_of
from tests.support.otlp import OtlpReceiver

_WITHOUT = Path(__file__).parent.parent / "support" / "without_telemetry"
_USERS, _MEMORIES, _DIMENSIONS, _CALLERS = 100, 100, 1536, 16
_TURNS, _TURN_S, _READ_EVERY_S = 10, 6.0, 5.0


@contextmanager
def _without_telemetry() -> Iterator[None]:
    """What is started meanwhile counts and traces nothing."""
    before = environ.get("PYTHONPATH")
    environ["PYTHONPATH"] = f"{_WITHOUT}:{before}" if before else str(_WITHOUT)
    try:
        yield
    finally:
        del environ["PYTHONPATH"]
        if before:
            environ["PYTHONPATH"] = before


async def _read_pages(cluster: LocalCluster) -> None:
    """As Prometheus does, three times as often."""
    services = [name for name in cluster.plan().record.ports if name == metrics_of(name.removesuffix("-metrics"))]
    while True:
        for service in services:
            await page_of(cluster, service.removesuffix("-metrics"))
        await asyncio.sleep(_READ_EVERY_S)


async def _operations(cluster: LocalCluster) -> float:
    """Calls that the router has counted."""
    family = (await families_of(cluster, "router-0"))["memory_operations"]
    return sum(sample.value for sample in family.samples if sample.name.endswith("_total"))


async def _searches_per_s(plan: Plan, seconds: float) -> float:
    async with generating(replace(plan, seconds=seconds)) as generator:
        await generator.go()
        calls = await generator.done()
    failed = len(calls) - len(calls.where(outcome=OK))
    if failed:
        raise SystemExit(f"{failed} of {len(calls)} searches failed: {dict(calls.counts())}")
    return len(calls) / seconds


async def main() -> None:
    """Prints each turn, and the ratio of the medians."""
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        receiver = await stack.enter_async_context(OtlpReceiver())
        made = {"embedder": "none", "dimensions": _DIMENSIONS}
        with receiver.environment():
            told = await stack.enter_async_context(LocalCluster(shards=2, **made))  # type: ignore[arg-type]
        with _without_telemetry():
            untold = await stack.enter_async_context(LocalCluster(shards=2, **made))  # type: ignore[arg-type]
        users = {"all": [f"user-{number}" for number in range(_USERS)]}
        plans: dict[str, Plan] = {}
        for name, cluster in {"with": told, "without": untold}.items():
            await eventually(cluster.healthy, within_s=60)
            plan = Plan(
                cluster.address,
                users,
                {"search": 1.0},
                callers=_CALLERS,
                dimensions=_DIMENSIONS,
                memories=1,
                file=result_file(directory, name),
            )
            await _searches_per_s(replace(plan, memories=_MEMORIES), 2)
            plans[name] = plan
        reading = asyncio.create_task(_read_pages(told))
        rates: dict[str, list[float]] = {name: [] for name in plans}
        for turn in range(_TURNS):
            # Who is first in a turn changes, so that a machine that becomes slower or quicker does it to both.
            for name in sorted(plans, reverse=turn % 2 == 1):
                rates[name].append(await _searches_per_s(plans[name], _TURN_S))
            print(f"with {rates['with'][-1]:.0f}/s, without {rates['without'][-1]:.0f}/s", flush=True)
        reading.cancel()
        with suppress(asyncio.CancelledError):
            await reading
        ratios = [one / other for one, other in zip(rates["with"], rates["without"], strict=True)]
        counted = [await _operations(cluster) for cluster in (told, untold)]
        if not receiver.received or not counted[0] or counted[1]:
            raise SystemExit("with and without telemetry were not what they are called")
        print(
            f"searches with metrics and 10 % tracing ÷ without: {statistics.median(ratios):.3f} (median of {_TURNS} "
            f"turns; {min(ratios):.3f} to {max(ratios):.3f}); {len(receiver.received)} spans received"
        )


if __name__ == "__main__":
    asyncio.run(main())
