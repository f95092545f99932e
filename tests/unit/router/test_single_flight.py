"""Reads that share one: who leaves takes nothing from the others, and nobody waits longer than his time."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from common.deadline import Deadline
from common.errors import Unavailable
from router.single_flight import SingleFlight


class Work:
    """What is done, when the test lets it."""

    def __init__(self) -> None:
        self.begun = 0
        self.given_up = 0
        self._answers: list[asyncio.Future[str]] = []

    async def __call__(self) -> str:
        self.begun += 1
        answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._answers.append(answer)
        try:
            return await answer
        except asyncio.CancelledError:
            self.given_up += 1
            raise

    def answer(self, text: str) -> None:
        self._answers.pop(0).set_result(text)

    def fail(self, error: Exception) -> None:
        self._answers.pop(0).set_exception(error)


@pytest.fixture
def flights() -> SingleFlight[str, str]:
    return SingleFlight()


@pytest.fixture
def work() -> Work:
    return Work()


async def _turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def _go(
    flights: SingleFlight[str, str], work: Callable[[], Awaitable[str]], *, key: str = "key", seconds: float = 60
) -> "asyncio.Task[tuple[str, bool]]":
    return asyncio.create_task(flights.run(key, Deadline.after(seconds), work))


async def test_one_goes_and_all_have_what_it_brings(flights: SingleFlight[str, str], work: Work) -> None:
    callers = [_go(flights, work) for _ in range(5)]
    await _turns()
    assert work.begun == 1
    work.answer("found")
    assert await asyncio.gather(*callers) == [("found", True), *[("found", False)] * 4]
    assert len(flights) == 0


async def test_who_comes_after_it_has_ended_goes_himself(flights: SingleFlight[str, str], work: Work) -> None:
    for text in ("one", "two"):
        caller = _go(flights, work)
        await _turns()
        work.answer(text)
        assert await caller == (text, True)
    assert work.begun == 2


async def test_other_questions_are_asked_for_themselves(flights: SingleFlight[str, str], work: Work) -> None:
    callers = [_go(flights, work, key=key) for key in ("a", "b")]
    await _turns()
    assert work.begun == 2
    work.answer("of a")
    work.answer("of b")
    assert await asyncio.gather(*callers) == [("of a", True), ("of b", True)]


async def test_the_first_may_leave_without_the_others(flights: SingleFlight[str, str], work: Work) -> None:
    first, second, third = (_go(flights, work) for _ in range(3))
    await _turns()
    first.cancel()
    await _turns()
    assert first.cancelled()
    second.cancel()
    await _turns()
    work.answer("found")
    assert await third == ("found", False)
    assert (work.begun, work.given_up) == (1, 0)


async def test_when_all_have_left_it_is_given_up_and_nobody_joins_it(
    flights: SingleFlight[str, str], work: Work
) -> None:
    callers = [_go(flights, work) for _ in range(2)]
    await _turns()
    for caller in callers:
        caller.cancel()
    late = _go(flights, work)
    await _turns()
    assert (work.begun, work.given_up) == (2, 1)
    work._answers.pop(0)
    work.answer("found")
    assert await late == ("found", True)
    assert len(flights) == 0


async def test_each_waits_for_as_long_as_its_own_time(flights: SingleFlight[str, str], work: Work) -> None:
    patient = _go(flights, work)
    await _turns()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await flights.run("key", Deadline.after(0.01), work)
    work.answer("found")
    assert await patient == ("found", True)
    assert work.begun == 1


async def test_a_failure_is_that_of_all_who_had_no_more_time(flights: SingleFlight[str, str], work: Work) -> None:
    callers = [_go(flights, work, seconds=60), _go(flights, work, seconds=30)]
    await _turns()
    work.fail(Unavailable("away", reason="AWAY"))
    for caller in callers:
        with pytest.raises(Unavailable):
            await caller
    assert work.begun == 1


async def test_who_has_more_time_tries_again_after_a_failure(flights: SingleFlight[str, str], work: Work) -> None:
    hasty = _go(flights, work, seconds=1)
    await _turns()
    patient = [_go(flights, work, seconds=60) for _ in range(3)]
    await _turns()
    work.fail(TimeoutError())
    with pytest.raises(TimeoutError):
        await hasty
    await _turns()
    assert work.begun == 2
    work.answer("found")
    assert sorted(await asyncio.gather(*patient)) == [("found", False), ("found", False), ("found", True)]


async def test_a_failure_that_nobody_hears_is_no_complaint(flights: SingleFlight[str, str], work: Work) -> None:
    """Of the event loop's, which tests take for a failure."""
    caller = _go(flights, work)
    await _turns()
    caller.cancel()
    await _turns()
    assert len(flights) == 0
