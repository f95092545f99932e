"""Natural batching: alone and at once while it is quiet, together when it is not, and nobody pays for another."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from common import gathering, tracing
from common.deadline import Deadline
from common.errors import InvalidArgument, OutcomeUnknown, Unavailable
from common.gathering import Gathering
from tests.support.virtual_time import virtual_time
from tests.unit.common.test_tracing import Recording


@dataclass
class _Work:
    """Answers a number with its double, when it is let."""

    alone_with: list[int] = field(default_factory=list)
    together_with: list[list[int]] = field(default_factory=list)
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    bad: frozenset[int] = frozenset()
    """Served alone, these are InvalidArgument; together, they spoil it for all."""
    left_out: frozenset[int] = frozenset()
    """Together, these are given no answer."""
    raises: Exception | None = None
    deadlines: list[Deadline] = field(default_factory=list)

    async def alone(self, request: int, _: Deadline) -> int:
        self.alone_with.append(request)
        await self.gate.wait()
        if request in self.bad:
            raise InvalidArgument("bad", reason="BAD_VALUE")
        return 2 * request

    async def together(self, requests: Sequence[int], deadline: Deadline) -> list[int | None]:
        self.together_with.append(list(requests))
        self.deadlines.append(deadline)
        await self.gate.wait()
        if self.raises is not None:
            raise self.raises
        if self.bad & set(requests):
            raise InvalidArgument("bad", reason="BAD_VALUE")
        return [None if request in self.left_out else 2 * request for request in requests]


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody loses patience during a test."""
    monkeypatch.setattr(gathering, "_PATIENCE_S", 60.0)


async def _settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


@asynccontextmanager
async def _busy(work: _Work, requests: Sequence[int]) -> AsyncIterator[list[asyncio.Task[int]]]:
    """Requests that all came while the two before them, -1 and -2, were under way. At the end all is let."""
    gathered = Gathering("together", work.alone, work.together)
    first = [asyncio.create_task(gathered.serve(number, Deadline.after(10))) for number in (-1, -2)]
    await _settle()
    tasks = [asyncio.create_task(gathered.serve(number, Deadline.after(10 + number))) for number in requests]
    await _settle()
    assert work.together_with == []
    yield tasks
    work.gate.set()
    assert await asyncio.gather(*first) == [-2, -4]
    await asyncio.gather(*tasks, return_exceptions=True)
    assert not gathered._tasks
    assert gathered._under_way == 0
    if gathered._patience:
        gathered._patience.cancel()


async def test_whoever_comes_alone_is_served_alone_and_at_once() -> None:
    work = _Work()
    work.gate.set()
    gathered = Gathering("together", work.alone, work.together)
    for number in range(3):
        assert await gathered.serve(number, Deadline.after(1)) == 2 * number
    assert work.alone_with == [0, 1, 2]
    assert work.together_with == []


@pytest.mark.usefixtures("patient")
@virtual_time
async def test_those_who_come_meanwhile_are_served_together() -> None:
    work = _Work()
    async with _busy(work, range(20)) as tasks:
        pass
    assert [task.result() for task in tasks] == [2 * number for number in range(20)]
    assert work.together_with == [list(range(20))]
    # Within the time of the most patient of them: none has less than it came with.
    assert work.deadlines[0].remaining_s() == pytest.approx(29)


@pytest.mark.usefixtures("patient")
async def test_no_more_than_fifty_are_served_together() -> None:
    work = _Work()
    async with _busy(work, range(120)) as tasks:
        pass
    assert [len(requests) for requests in work.together_with] == [50, 50, 20]
    assert [task.result() for task in tasks] == [2 * number for number in range(120)]


@pytest.mark.usefixtures("patient")
async def test_a_bad_one_fails_alone() -> None:
    work = _Work(bad=frozenset({3}))
    async with _busy(work, range(6)) as tasks:
        pass
    assert isinstance(tasks[3].exception(), InvalidArgument)
    assert [task.result() for number, task in enumerate(tasks) if number != 3] == [0, 2, 4, 8, 10]


@pytest.mark.usefixtures("patient")
async def test_what_is_left_out_is_served_alone() -> None:
    work = _Work(left_out=frozenset({1, 4}))
    async with _busy(work, range(5)) as tasks:
        pass
    assert [task.result() for task in tasks] == [0, 2, 4, 6, 8]
    assert work.alone_with[2:] == [1, 4]


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("error", [OutcomeUnknown("in doubt"), Unavailable("away"), TimeoutError()])
async def test_doubt_and_absence_are_everybodys(error: Exception) -> None:
    """Stored again alone, they would hear that it went well, by a commit of which that is not known."""
    work = _Work(raises=error)
    async with _busy(work, range(4)) as tasks:
        pass
    assert [task.exception() for task in tasks] == [error] * 4
    assert work.alone_with == [-1, -2]


@pytest.mark.usefixtures("patient")
async def test_a_busy_slot_is_nobody_elses() -> None:
    work = _Work(raises=Unavailable("busy", reason="SLOT_BUSY"))
    async with _busy(work, range(3)) as tasks:
        pass
    assert [task.result() for task in tasks] == [0, 2, 4]


@pytest.mark.usefixtures("patient")
async def test_whoever_leaves_while_waiting_is_not_served() -> None:
    work = _Work()
    async with _busy(work, range(5)) as tasks:
        tasks[2].cancel()
        await _settle()
    assert work.together_with == [[0, 1, 3, 4]]
    assert tasks[2].cancelled()
    assert [task.result() for number, task in enumerate(tasks) if number != 2] == [0, 2, 6, 8]


@pytest.mark.usefixtures("patient")
async def test_whoever_leaves_later_takes_nothing_from_the_others() -> None:
    work = _Work()
    gathered = Gathering("together", work.alone, work.together)
    first = [asyncio.create_task(gathered.serve(number, Deadline.after(10))) for number in (-1, -2)]
    await _settle()
    tasks = [asyncio.create_task(gathered.serve(number, Deadline.after(10))) for number in range(4)]
    await _settle()
    first[0].cancel()
    await _settle()
    assert work.together_with == [[0, 1, 2, 3]]
    tasks[1].cancel()
    await _settle()
    work.gate.set()
    assert list(await asyncio.gather(tasks[0], tasks[2], tasks[3], first[1])) == [0, 4, 6, -4]


@pytest.mark.usefixtures("patient")
async def test_what_is_done_together_is_in_the_trace_that_is_kept_and_the_others_lead_there() -> None:
    work = _Work()

    async def together(requests: Sequence[int], deadline: Deadline) -> list[int | None]:
        with tracing.span("statement"):
            return await work.together(requests, deadline)

    gathered = Gathering("together", work.alone, together)

    async def call(number: int) -> int:
        parent = f"00-{number:032x}-{number:016x}-{'01' if number == 2 else '00'}"
        with tracing.received("Service/Rpc", [("traceparent", parent)], begins=False):
            return await gathered.serve(number, Deadline.after(10))

    # Whatever is slow is kept, and everything is slower than that.
    async with Recording(slow_s=0.0) as recording:
        first = [asyncio.create_task(gathered.serve(number, Deadline.after(10))) for number in (-1, -2)]
        await _settle()
        tasks = [asyncio.create_task(call(number)) for number in (1, 2, 3)]
        await _settle()
        work.gate.set()
        await asyncio.gather(*first, *tasks)
        recording.names()
        spans = recording.exporter.get_finished_spans()
    assert work.together_with == [[1, 2, 3]]
    waits = {span.context.trace_id: span for span in spans if span.name == "together" and span.context}
    assert waits.keys() == {1, 2, 3}
    (statement,) = [span for span in spans if span.name == "statement"]
    assert statement.parent is not None
    assert waits[2].context is not None
    assert (statement.parent.trace_id, statement.parent.span_id) == (2, waits[2].context.span_id)
    linked = {
        number: [(link.context.trace_id, link.context.span_id) for link in wait.links] for number, wait in waits.items()
    }
    assert linked == {1: [(2, waits[2].context.span_id)], 2: [], 3: [(2, waits[2].context.span_id)]}
    assert [event.attributes for event in waits[1].events] == [{"memshard.gathered": 3}]


@virtual_time
async def test_nobody_waits_long_for_what_is_held_up() -> None:
    """Two are held up, by a slot that is being handed over; those who come after them are begun all the same."""
    work = _Work()
    gathered = Gathering("together", work.alone, work.together)
    held_up = [asyncio.create_task(gathered.serve(number, Deadline.after(10))) for number in (-1, -2)]
    await _settle()
    tasks = [asyncio.create_task(gathered.serve(number, Deadline.after(10))) for number in range(4)]
    async with asyncio.timeout(1):
        while not work.together_with:  # The time it takes is what is tested.
            await asyncio.sleep(0.001)
    assert work.together_with == [[0, 1, 2, 3]]
    work.gate.set()
    await asyncio.gather(*held_up, *tasks)
