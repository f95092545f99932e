"""What metrics and traces cost: searches a second with them ÷ without, on two clusters side by side.

    python -m tests.cluster.overhead          # six minutes; exit code 1 below 0.95
    python -m tests.cluster.overhead --quick  # one and a half: whether it works, and no figure to go by

One cluster is as `memshard up` makes it, with one trace in ten sent to a receiver here, and its pages read in each of
its turns, twice as often as our prometheus.yml does. In the other nothing is counted, served or traced at all
(tests/support/without_telemetry). In each round the same callers search both, one after the other, and who comes first
changes, so that what else the machine does falls on both. The result is the median of the rounds' ratios.

The workload is that of the benchmark (docs/performance.md): 100 users with 500 memories each. The fewer a user has, the
less of a search is the database's work, and the more of it is what is measured here: `--memories 100` shows that. What
receives the traces and reads the pages is on the same machine, and counts against them.

Also printed is the processor time that a search took of each kind of process: it says where the difference comes from,
and varies less than what a machine gets done in three seconds.
"""

import argparse
import asyncio
import statistics
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from os import environ
from pathlib import Path

import psutil

from local.cluster import metrics_of
from tests.support.cluster import LocalCluster
from tests.support.eventually import eventually
from tests.support.generator import OK, Plan, generating, result_file
from tests.support.metrics import families_of, page_of
from tests.support.otlp import OtlpReceiver
from tests.support.traced import receiving_traces

_UNTOLD = Path(__file__).parent.parent / "support" / "without_telemetry"
_AT_LEAST = 0.95
_WITH, _WITHOUT = "with", "without"
_USERS, _DIMENSIONS, _CALLERS = 100, 1536, 16
_READ_EVERY_S = 15.0
# Of processes, with how their names begin.
_KINDS = {"router": "router-", "shards": "shard-", "databases": "postgres-"}
# Of all searches those whose traces have come; some of the newest are on their way.
_LEAST_TRACED = 0.05


@dataclass(frozen=True)
class _Length:
    rounds: int
    turn_s: float


# Many short turns: what else the machine does, or the one below it, lasts for seconds.
_FULL, _QUICK = _Length(40, 3.0), _Length(3, 3.0)
_MEMORIES = 500


@dataclass
class _Turns:
    """What one cluster did in all of its turns."""

    searches: int = 0
    cpu_s: dict[str, float] = field(default_factory=lambda: dict.fromkeys(_KINDS, 0.0))
    """By kind of process."""

    def add(self, searches: int, cpu_s: dict[str, float]) -> None:
        """One more turn."""
        self.searches += searches
        for kind, taken_s in cpu_s.items():
            self.cpu_s[kind] += taken_s

    def ms_each(self, kind: str) -> float:
        """Processor time that a search took of these processes."""
        return self.cpu_s[kind] / self.searches * 1000


@contextmanager
def _without_telemetry() -> Iterator[None]:
    """What is started meanwhile counts, serves and traces nothing."""
    before = environ.get("PYTHONPATH")
    environ["PYTHONPATH"] = f"{_UNTOLD}:{before}" if before else str(_UNTOLD)
    try:
        yield
    finally:
        del environ["PYTHONPATH"]
        if before:
            environ["PYTHONPATH"] = before


def _services(cluster: LocalCluster) -> list[str]:
    """The services that have a port for their metrics."""
    ports = cluster.plan().record.ports
    return [name for name in ports if metrics_of(name) in ports]


def _cpu_s(cluster: LocalCluster) -> dict[str, float]:
    """Processor time that the cluster's processes have taken so far, by kind."""
    taken = dict.fromkeys(_KINDS, 0.0)
    for name, pid in cluster.pids().items():
        for kind, prefix in _KINDS.items():
            if name.startswith(prefix):
                process = psutil.Process(pid)
                for one in (process, *process.children(recursive=True)):
                    # What has ended meanwhile is among what its parent says of its children.
                    with suppress(psutil.NoSuchProcess):
                        taken[kind] += sum(one.cpu_times()[:4])
    return taken


@asynccontextmanager
async def _read(cluster: LocalCluster) -> AsyncIterator[None]:
    """All pages again and again meanwhile, as Prometheus does."""

    async def read() -> None:
        while True:
            for service in _services(cluster):
                await page_of(cluster, service)
            await asyncio.sleep(_READ_EVERY_S)

    reading = asyncio.create_task(read())
    try:
        yield
    finally:
        reading.cancel()
        with suppress(asyncio.CancelledError):
            await reading


async def _searches_per_s(plan: Plan, seconds: float) -> float:
    async with generating(replace(plan, seconds=seconds)) as generator:
        await generator.go()
        calls = await generator.done()
    failed = len(calls) - len(calls.where(outcome=OK))
    if failed:
        raise SystemExit(f"{failed} of {len(calls)} searches failed: {dict(calls.counts())}")
    return len(calls) / seconds


async def _filled(cluster: LocalCluster, file: str, memories: int) -> Plan:
    """What is searched for, once it is there."""
    await eventually(cluster.healthy, within_s=60)
    plan = Plan(
        cluster.address,
        {"all": [f"user-{number}" for number in range(_USERS)]},
        {"search": 1.0},
        callers=_CALLERS,
        dimensions=_DIMENSIONS,
        memories=1,
        file=file,
    )
    await _searches_per_s(replace(plan, memories=memories), 2)
    return plan


async def _compared(
    clusters: dict[str, LocalCluster], plans: dict[str, Plan], length: _Length
) -> tuple[list[float], dict[str, _Turns]]:
    """The ratio of each round, which is printed, and what each cluster did."""
    ratios = []
    turns = {name: _Turns() for name in clusters}
    for number in range(length.rounds):
        rates = {}
        for name in sorted(clusters, reverse=number % 2 == 1):
            async with AsyncExitStack() as stack:
                if name == _WITH:
                    await stack.enter_async_context(_read(clusters[name]))
                before = _cpu_s(clusters[name])
                rates[name] = await _searches_per_s(plans[name], length.turn_s)
                after = _cpu_s(clusters[name])
                taken = {kind: after[kind] - before[kind] for kind in _KINDS}
                turns[name].add(round(rates[name] * length.turn_s), taken)
        ratios.append(rates[_WITH] / rates[_WITHOUT])
        print(
            f"round {number + 1:2}: with {rates[_WITH]:.0f}/s, without {rates[_WITHOUT]:.0f}/s: {ratios[-1]:.3f}",
            flush=True,
        )
    return ratios, turns


def _costs(turns: dict[str, _Turns]) -> str:
    """What a search took of each kind of process."""
    told, untold = turns[_WITH], turns[_WITHOUT]
    each = (f"{kind} {told.ms_each(kind):.3f} with, {untold.ms_each(kind):.3f} without" for kind in _KINDS)
    return f"processor time of a search, ms: {'; '.join(each)}"


async def _searches(cluster: LocalCluster) -> float:
    """Searches that the router has counted."""
    family = (await families_of(cluster, "router-0"))["memory_operations"]
    return sum(
        sample.value
        for sample in family.samples
        if sample.name.endswith("_total") and sample.labels["operation"] == "SearchMemories"
    )


async def _check(told: LocalCluster, untold: LocalCluster, receiver: OtlpReceiver) -> str:
    """What came of the one's telemetry. SystemExit when the clusters are not what they are called."""
    for service in _services(untold):
        with suppress(OSError):
            await page_of(untold, service)
            raise SystemExit(f"{service} has a page of metrics, and should have none")
    searches = await _searches(told)
    roots = sum(found.span.name.endswith("MemoryService/SearchMemories") for found in receiver.received)
    if not searches or roots < _LEAST_TRACED * searches:
        raise SystemExit(f"{searches:.0f} searches were counted, and traces of {roots} came")
    return f"{searches:.0f} searches counted, traces of {roots / searches:.1%} received"


def _verdict(ratios: list[float]) -> tuple[str, bool]:
    """What to say of them, and whether it is enough."""
    median = statistics.median(ratios)
    low, _, high = statistics.quantiles(ratios, n=4)
    said = (
        f"searches/s with metrics and 10 % tracing ÷ without: {median:.3f}, the median of {len(ratios)} rounds "
        f"(half of them within {low:.3f} to {high:.3f}, all within {min(ratios):.3f} to {max(ratios):.3f}); "
        f"at least {_AT_LEAST} is wanted"
    )
    return said, median >= _AT_LEAST


async def main(length: _Length, memories: int) -> bool:
    """Prints each round and the result, and returns whether it is enough."""
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        told = LocalCluster(shards=2, embedder="none", dimensions=_DIMENSIONS)
        receiver = await stack.enter_async_context(receiving_traces(told, soon=False))
        with _without_telemetry():
            untold = await stack.enter_async_context(LocalCluster(shards=2, embedder="none", dimensions=_DIMENSIONS))
        clusters = {_WITH: told, _WITHOUT: untold}
        plans = {
            name: await _filled(cluster, result_file(directory, name), memories) for name, cluster in clusters.items()
        }
        ratios, turns = await _compared(clusters, plans, length)
        print(await _check(told, untold, receiver))
        print(_costs(turns))
    said, enough = _verdict(ratios)
    print(said)
    return enough


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Searches a second with metrics and traces ÷ without.")
    parser.add_argument("--quick", action="store_true", help="a few short rounds, to see that it works")
    parser.add_argument("--memories", type=int, default=_MEMORIES, help="memories of each user (%(default)s)")
    wanted = parser.parse_args()
    raise SystemExit(0 if asyncio.run(main(_QUICK if wanted.quick else _FULL, wanted.memories)) else 1)
