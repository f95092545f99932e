"""`python -m loadtest.bench.shards`: what a request costs the router with 1, 2, 4 and 8 shards, on one machine.

All shards of one machine share its processors, so more of them serve no more calls there. What must not grow is what a
call costs where it is routed: a router that looks at every shard for each call would be the end of growing. So this
counts the router's own processor time, as its metrics page has it (`process_cpu_seconds_total`), over what it needs at
rest, where it looks after its shards.
"""

import argparse
import asyncio
import sys
import time
import urllib.request
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from statistics import median

import uvloop

from loadtest.bench.cluster import Running, running
from loadtest.bench.clustered import Routed
from loadtest.bench.contender import Endpoint, Row
from loadtest.bench.workload import Questions, Workload, content, memory_id, user_name

_CPU = "process_cpu_seconds_total "
_WARM_UP_S = 1.0
_KINDS = ("get", "search", "fan-out")
MOST_FOR_ONE_USER = 1.10
"""A call for one user may cost the router this much with eight shards, of what it costs with one."""
MOST_FOR_A_SHARD = 1.20
"""A fan-out may cost the router, and a shard, this much for each shard that is asked, of what it costs with one."""

Call = Callable[[int, Questions], Awaitable[object]]


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one kind of call with one number of shards: processor time in microseconds."""

    calls: int
    rate: float
    """Calls a second."""
    router_us: float
    """Of the router, for a call."""
    shard_us: float
    """Of all shards' services together, for a call; without their databases."""


@dataclass(frozen=True, slots=True)
class Options:
    """How much is measured."""

    shards: tuple[int, ...]
    workload: Workload
    callers: int
    rounds: int
    seconds: float


async def measure(options: Options, shards: int) -> dict[str, Cost]:
    """Every kind of call, in one cluster."""
    async with running(shards, options.workload.dimensions) as cluster:
        routed = Routed()
        await routed.open(Endpoint(address=cluster.address), options.callers, options.workload.dimensions)
        try:
            await _load(routed, options.workload)
            calls: dict[str, Call] = {
                "get": lambda caller, ask: _get(routed, caller, ask),
                "search": lambda caller, ask: _search(routed, caller, ask),
                "fan-out": lambda _, ask: routed.search_all(ask.search()[1]),
            }
            costs: dict[str, list[Cost]] = {kind: [] for kind in _KINDS}
            for kind in _KINDS:
                await _make(calls[kind], options, 0, _WARM_UP_S)
            for number in range(1, options.rounds + 1):
                resting = await _resting(cluster, options.seconds)
                for kind in _KINDS:
                    costs[kind].append(await _cost(cluster, calls[kind], options, number, resting))
            if routed.watch.levels:
                raise SystemExit(f"this is no measurement: answers came at {dict(routed.watch.levels)}")
            return {kind: _middle(of_rounds) for kind, of_rounds in costs.items()}
        finally:
            await routed.close()


async def _load(routed: Routed, workload: Workload) -> None:
    for user in range(workload.users):
        name = user_name(user)
        rows = [Row(name, memory_id(user, n), content(name, n), v) for n, v in enumerate(workload.rows(user))]
        await routed.bulk(0, rows)


async def _get(routed: Routed, caller: int, ask: Questions) -> object:
    user, memory = ask.get()
    return await routed.get(caller, user_name(user), memory)


async def _search(routed: Routed, caller: int, ask: Questions) -> object:
    user, query = ask.search()
    return await routed.search(caller, user_name(user), query)


async def _make(call: Call, options: Options, number: int, seconds: float) -> int:
    """How many calls the callers made in so many seconds."""
    end = time.perf_counter() + seconds
    made = [0] * options.callers

    async def caller(index: int) -> None:
        ask = options.workload.questions(index, number)
        while time.perf_counter() < end:
            await call(index, ask)
            made[index] += 1

    async with asyncio.TaskGroup() as group:
        for index in range(options.callers):
            group.create_task(caller(index))
    return sum(made)


async def _cost(cluster: Running, call: Call, options: Options, number: int, resting: tuple[float, float]) -> Cost:
    began, before = time.perf_counter(), await _used(cluster)
    count = await _make(call, options, number, options.seconds)
    took, after = time.perf_counter() - began, await _used(cluster)
    router, shards = (max(0.0, a - b - rest * took) for a, b, rest in zip(after, before, resting, strict=True))
    return Cost(count, count / took, router / count * 1e6, shards / count * 1e6)


async def _resting(cluster: Running, seconds: float) -> tuple[float, float]:
    """Cores that the router, and all shards together, keep busy when nobody asks anything."""
    began, before = time.perf_counter(), await _used(cluster)
    await asyncio.sleep(seconds)
    took, after = time.perf_counter() - began, await _used(cluster)
    return (after[0] - before[0]) / took, (after[1] - before[1]) / took


async def _used(cluster: Running) -> tuple[float, float]:
    """Seconds of processor time that the router has used, and all shards together."""
    pages = await asyncio.gather(*(asyncio.to_thread(_seconds, url) for url in cluster.metrics["router"]))
    of_shards = await asyncio.gather(*(asyncio.to_thread(_seconds, url) for url in cluster.metrics["shard"]))
    return sum(pages), sum(of_shards)


def _seconds(url: str) -> float:
    with urllib.request.urlopen(url, timeout=10) as page:  # noqa: S310  # A page of the cluster that was started here.
        lines = page.read().decode().splitlines()
    return sum(float(line.removeprefix(_CPU)) for line in lines if line.startswith(_CPU))


def _middle(of_rounds: Sequence[Cost]) -> Cost:
    return Cost(
        sum(one.calls for one in of_rounds),
        median(one.rate for one in of_rounds),
        median(one.router_us for one in of_rounds),
        median(one.shard_us for one in of_rounds),
    )


@dataclass(frozen=True, slots=True)
class Ratio:
    """What something costs with the most shards, of what it costs with the fewest; and how much that may be."""

    what: str
    measured: float
    most: float


def ratios(costs: dict[int, dict[str, Cost]]) -> list[Ratio]:
    """`costs` by the number of shards and the kind of call."""
    few, many = min(costs), max(costs)
    one, all_of_them = costs[few], costs[many]
    found = [
        Ratio(f"router's time for a {kind}", all_of_them[kind].router_us / one[kind].router_us, MOST_FOR_ONE_USER)
        for kind in ("get", "search")
    ]
    a, b = one["fan-out"], all_of_them["fan-out"]
    found.append(
        Ratio("router's time for a shard of a fan-out", b.router_us / many / (a.router_us / few), MOST_FOR_A_SHARD)
    )
    found.append(
        Ratio("shard's time for its part of a fan-out", b.shard_us / many / (a.shard_us / few), MOST_FOR_A_SHARD)
    )
    return found


def table(costs: dict[int, dict[str, Cost]]) -> str:
    """As it stands in docs/performance.md."""
    lines = [
        "| shards | call | calls/s | router µs a call | router µs a shard asked | shards µs a shard asked |",
        "|---|---|---|---|---|---|",
    ]
    for shards, of_kinds in sorted(costs.items()):
        for kind, cost in of_kinds.items():
            asked = shards if kind == "fan-out" else 1
            lines.append(
                f"| {shards} | {kind} | {cost.rate:,.0f} | {cost.router_us:,.0f} | {cost.router_us / asked:,.0f} "
                f"| {cost.shard_us / asked:,.0f} |"
            )
    few, many = min(costs), max(costs)
    lines += ["", f"| with {many} ÷ with {few} | measured | must |", "|---|---|---|"]
    for ratio in ratios(costs):
        missed = "" if ratio.measured <= ratio.most else "**missed** "
        lines.append(f"| {ratio.what} | {missed}{ratio.measured:.2f} | ≤ {ratio.most:.2f} |")
    return "\n".join(lines)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m loadtest.bench.shards", description=__doc__)
    parser.add_argument("--shards", type=int, action="append", help="a number of shards; repeatable (1, 2, 4, 8)")
    parser.add_argument("--rounds", type=int, default=3, help="of which the median counts")
    parser.add_argument("--seconds", type=float, default=4.0, help="length of a round of one kind of call")
    parser.add_argument("--callers", type=int, default=4, help="at once; more of them share what a call costs")
    return parser.parse_args(arguments)


async def _main(arguments: argparse.Namespace) -> int:
    options = Options(
        tuple(sorted(arguments.shards or (1, 2, 4, 8))),
        Workload(users=64, memories=50, dimensions=384),
        arguments.callers,
        arguments.rounds,
        arguments.seconds,
    )
    costs: dict[int, dict[str, Cost]] = {}
    for shards in options.shards:
        costs[shards] = await measure(options, shards)
        for kind, cost in costs[shards].items():
            print(f"{shards} shards, {kind}: {cost.router_us:,.0f} µs of the router", file=sys.stderr, flush=True)
    print(table(costs))
    return 1 if any(ratio.measured > ratio.most for ratio in ratios(costs)) else 0


if __name__ == "__main__":
    sys.exit(uvloop.run(_main(_parse(None))))
