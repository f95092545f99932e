"""Storing many records: bounded, tried again where that helps, given up where it does not."""

import asyncio
from collections.abc import Iterator
from typing import cast

import pytest

from cli.ingest import GaveUp, ingest
from cli.records import BadRecord, Parsed, Record
from memshard import (
    AlreadyExists,
    AsyncMemoryClient,
    DeadlineExceeded,
    InvalidArgument,
    MemshardError,
    ResourceExhausted,
    Unavailable,
)


class _Store:
    """In place of the client: what each content's attempts end in, in turn; then success."""

    def __init__(self, outcomes: dict[str, list[MemshardError]] | None = None) -> None:
        self.outcomes = outcomes or {}
        self.attempts: list[str] = []
        self.under_way = 0
        self.most_under_way = 0

    async def store(self, user_id: str, content: str, **fields: object) -> None:
        self.attempts.append(content)
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        await asyncio.sleep(0)
        self.under_way -= 1
        if left := self.outcomes.get(content):
            raise left.pop(0)


class _Run:
    def __init__(self) -> None:
        self.fates: dict[str, MemshardError | None] = {}
        self.delays: list[float] = []
        self.others = 0  # A wait takes until another record's fate is known, as long as fewer than these are.

    async def __call__(self, store: _Store, records: Iterator[Parsed], concurrency: int = 4) -> None:
        async def sleep(delay_s: float) -> None:
            self.delays.append(delay_s)
            known = len(self.fates)
            while len(self.fates) == known < self.others:
                await asyncio.sleep(0)

        def report(record: Parsed, error: MemshardError | None) -> None:
            self.fates[record.source] = error

        client = cast(AsyncMemoryClient, store)
        await ingest(client, records, report, concurrency=concurrency, sleep=sleep)


def _records(*contents: str) -> Iterator[Parsed]:
    return (Record(source=content, id=content, user_id="u", content=content) for content in contents)


def _down() -> Unavailable:
    return Unavailable("down", reason="UNAVAILABLE")


async def test_every_record_is_stored_once_with_bounded_concurrency() -> None:
    run, store = _Run(), _Store()
    contents = [str(number) for number in range(500)]
    await run(store, _records(*contents))
    assert sorted(store.attempts) == sorted(contents)
    assert run.fates == dict.fromkeys(contents)
    assert store.most_under_way <= 4


async def test_no_more_is_read_ahead_than_twice_what_is_under_way() -> None:
    taken = 0
    gate = asyncio.Event()

    def records() -> Iterator[Parsed]:
        nonlocal taken
        for record in _records(*map(str, range(100))):
            taken += 1
            yield record

    class Blocked(_Store):
        async def store(self, user_id: str, content: str, **fields: object) -> None:
            most.append(taken)
            await gate.wait()

    most: list[int] = []
    task = asyncio.create_task(_Run()(Blocked(), records(), concurrency=4))
    async with asyncio.timeout(10):
        while len(most) < 4:
            await asyncio.sleep(0)
    gate.set()
    await task
    assert max(most[:4]) <= 4 + 2 * 4 + 1
    assert taken == 100


async def test_refused_records_do_not_sink_the_others() -> None:
    run = _Run()
    taken, invalid = AlreadyExists("taken"), InvalidArgument("bad")
    bad = BadRecord("line 3", "content", "is missing")

    def records() -> Iterator[Parsed]:
        yield from _records("a", "b", "c")
        yield bad

    await run(_Store({"a": [taken], "b": [invalid]}), records())
    assert run.fates == {"a": taken, "b": invalid, "c": None, "line 3": None}
    assert run.delays == []


@pytest.mark.parametrize("error", [_down(), DeadlineExceeded("late"), ResourceExhausted("busy")])
async def test_passing_failure_is_waited_out(error: MemshardError) -> None:
    run, store = _Run(), _Store({"a": [error, error, error]})
    await run(store, _records("a"))
    assert run.fates == {"a": None}
    assert store.attempts == ["a"] * 4
    assert run.delays == sorted(run.delays)


async def test_service_says_how_long_to_wait_within_bounds() -> None:
    run = _Run()
    waits = [ResourceExhausted("busy", retry_after_s=seconds) for seconds in (2.0, 3_600.0)]
    await run(_Store({"a": list(waits)}), _records("a"))
    assert run.delays == [2.0, 5.0]


async def test_record_that_keeps_failing_is_reported_while_others_are_stored() -> None:
    run = _Run()
    others = [str(number) for number in range(200)]
    run.others = len(others)
    await run(_Store({"a": [_down() for _ in range(100)]}), _records("a", *others), concurrency=2)
    assert isinstance(run.fates["a"], Unavailable)
    assert all(run.fates[other] is None for other in others)


async def test_cluster_that_answers_nothing_ends_the_import() -> None:
    run = _Run()
    contents = [str(number) for number in range(100)]
    store = _Store({content: [_down() for _ in range(100)] for content in contents})
    with pytest.raises(GaveUp):
        await run(store, _records(*contents), concurrency=4)
    assert len(store.attempts) <= 4 * 6


async def test_cluster_that_is_not_there_ends_the_import_at_once() -> None:
    run, store = _Run(), _Store({"a": [Unavailable("connection refused")] * 9})
    with pytest.raises(GaveUp):
        await run(store, _records("a", "b"), concurrency=1)
    assert store.attempts == ["a"]


async def test_file_that_cannot_be_read_on_fails_after_what_was_read() -> None:
    def records() -> Iterator[Parsed]:
        yield from _records("a")
        raise OSError("disk gone")

    run = _Run()
    with pytest.raises(OSError, match="disk gone"):
        await run(_Store(), records())
    assert run.fates == {"a": None}


async def test_cancelling_ends_it_with_the_reader() -> None:
    started = asyncio.Event()

    class Blocked(_Store):
        async def store(self, user_id: str, content: str, **fields: object) -> None:
            started.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(_Run()(Blocked(), _records(*map(str, range(100)))))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
