"""Storing many records: in bounded batches, tried again where that helps, given up where it does not."""

import asyncio
from collections.abc import Iterator, Sequence
from typing import cast

import pytest

from cli.ingest import MAX_BATCH, GaveUp, ingest
from cli.records import BadRecord, Parsed, Record
from memshard import (
    AlreadyExists,
    AsyncMemoryClient,
    BatchOutcome,
    BatchResult,
    DeadlineExceeded,
    InvalidArgument,
    MemshardError,
    NewMemory,
    ResourceExhausted,
    Unavailable,
    WriteReceipt,
)


class _Store:
    """In place of the client: what each content's attempts end in, in turn; then success.

    Attributes:
        failures: what whole calls end in, in turn, before any of that.
        attempts: the contents of each call.
    """

    def __init__(self, outcomes: dict[str, list[MemshardError]] | None = None) -> None:
        self.outcomes = outcomes or {}
        self.failures: list[MemshardError] = []
        self.attempts: list[list[str]] = []
        self.under_way = 0
        self.most_under_way = 0

    async def store_many(self, memories: Sequence[NewMemory]) -> BatchResult:
        self.attempts.append([memory.content for memory in memories])
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        await asyncio.sleep(0)
        self.under_way -= 1
        if self.failures:
            raise self.failures.pop(0)
        outcomes = []
        for memory in memories:
            left = self.outcomes.get(memory.content)
            outcomes.append(BatchOutcome(memory.id, left.pop(0) if left else None))
        return BatchResult(tuple(outcomes), WriteReceipt())

    @property
    def sent(self) -> list[str]:
        """The contents of all calls."""
        return [content for attempt in self.attempts for content in attempt]


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
    assert sorted(store.sent) == sorted(contents)
    assert run.fates == dict.fromkeys(contents)
    assert store.most_under_way <= 4
    assert max(map(len, store.attempts)) <= MAX_BATCH


async def test_records_that_are_there_go_in_a_full_batch() -> None:
    taken = 0

    def records() -> Iterator[Parsed]:
        nonlocal taken
        for record in _records(*map(str, range(1_000))):
            taken += 1
            yield record

    class SlowAtFirst(_Store):
        async def store_many(self, memories: Sequence[NewMemory]) -> BatchResult:
            async with asyncio.timeout(10):
                # Until the reader is more than one batch ahead.
                while not self.attempts and taken < len(memories) + 1.5 * MAX_BATCH:
                    await asyncio.sleep(0)
            return await super().store_many(memories)

    store = SlowAtFirst()
    await _Run()(store, records(), concurrency=1)
    assert len(store.attempts[1]) == MAX_BATCH
    assert len(store.sent) == 1_000


async def test_batches_of_large_records_stay_below_what_a_call_may_hold() -> None:
    run, store = _Run(), _Store()
    await run(store, _records(*(f"{n:03}" + "x" * 65_533 for n in range(200))))
    assert len(store.sent) == 200
    assert max(sum(map(len, attempt)) for attempt in store.attempts) < 1024**2


async def test_no_more_is_read_ahead_than_twice_what_is_under_way() -> None:
    taken = 0
    gate = asyncio.Event()
    most: list[int] = []

    def records() -> Iterator[Parsed]:
        nonlocal taken
        for record in _records(*map(str, range(3_000))):
            taken += 1
            yield record

    class Blocked(_Store):
        async def store_many(self, memories: Sequence[NewMemory]) -> BatchResult:
            most.append(taken)
            await gate.wait()
            return await super().store_many(memories)

    task = asyncio.create_task(_Run()(Blocked(), records(), concurrency=2))
    async with asyncio.timeout(10):
        while len(most) < 2:
            await asyncio.sleep(0)
    gate.set()
    await task
    assert max(most[:2]) <= (2 + 2 * 2) * MAX_BATCH + 1
    assert taken == 3_000


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


async def test_record_that_cannot_be_sent_does_not_sink_those_it_is_with() -> None:
    class Checks(_Store):
        async def store_many(self, memories: Sequence[NewMemory]) -> BatchResult:
            if any(memory.content == "13" for memory in memories):
                raise InvalidArgument("cannot be sent")
            return await super().store_many(memories)

    run, store = _Run(), Checks()
    contents = [str(number) for number in range(100)]
    await run(store, _records(*contents), concurrency=1)
    assert isinstance(run.fates.pop("13"), InvalidArgument)
    assert run.fates == dict.fromkeys(run.fates)
    assert sorted(store.sent) == sorted(set(contents) - {"13"})


@pytest.mark.parametrize("error", [_down(), DeadlineExceeded("late"), ResourceExhausted("busy")])
@pytest.mark.parametrize("whole_call", [True, False])
async def test_passing_failure_is_waited_out(error: MemshardError, whole_call: bool) -> None:
    run, store = _Run(), _Store()
    failures = [error, error, error]
    if whole_call:
        store.failures = failures
    else:
        store.outcomes["a"] = failures
    await run(store, _records("a"))
    assert run.fates == {"a": None}
    assert store.sent == ["a"] * 4
    assert run.delays == sorted(run.delays)


async def test_only_what_failed_is_sent_again() -> None:
    run, store = _Run(), _Store({"b": [_down()]})
    ready = [BadRecord(str(number), "", "is none") for number in range(5)]
    await run(store, iter([*ready, *_records("a", "b", "c")]), concurrency=1)
    assert sorted(store.sent) == ["a", "b", "b", "c"]
    assert {source: fate for source, fate in run.fates.items() if source in "abc"} == dict.fromkeys("abc")


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
    assert run.fates == {}


async def test_cluster_that_is_not_there_ends_the_import_at_once() -> None:
    run, store = _Run(), _Store()
    store.failures = [Unavailable("connection refused")] * 9
    with pytest.raises(GaveUp):
        await run(store, _records("a", "b"), concurrency=1)
    assert len(store.attempts) == 1


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
        async def store_many(self, memories: Sequence[NewMemory]) -> BatchResult:
            started.set()
            await asyncio.Event().wait()
            raise AssertionError("nobody sets it")

    task = asyncio.create_task(_Run()(Blocked(), _records(*map(str, range(100)))))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
