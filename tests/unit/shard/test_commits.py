"""Writes outlive their callers: giving up on one never stops it."""

import asyncio

import pytest
from structlog.testing import capture_logs

from common.errors import AlreadyExists
from shard.commits import Commits


class _Write:
    """A write that can be held up between its beginning and its commit."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.begun, self.may_commit = asyncio.Event(), asyncio.Event()
        self.committed = False
        self._failure = failure

    async def run(self) -> str:
        self.begun.set()
        await self.may_commit.wait()
        if self._failure is not None:
            raise self._failure
        self.committed = True
        return "receipt"


async def test_caller_that_waits_gets_the_result() -> None:
    write = _Write()
    write.may_commit.set()
    assert await Commits().run(write.run()) == "receipt"


async def test_caller_that_waits_gets_the_error() -> None:
    write = _Write(AlreadyExists("the id is taken"))
    write.may_commit.set()
    with pytest.raises(AlreadyExists):
        await Commits().run(write.run())


async def test_write_goes_on_when_its_caller_is_cancelled_and_is_waited_for() -> None:
    commits, write = Commits(), _Write()
    caller = asyncio.create_task(commits.run(write.run()))
    await write.begun.wait()
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    settled = asyncio.create_task(commits.settled(30.0))
    await asyncio.sleep(0)
    assert not settled.done()
    write.may_commit.set()
    await settled
    assert write.committed


async def test_write_that_fails_after_its_caller_left_is_settled_too() -> None:
    """Without a complaint of the event loop that nobody took the exception, which would be a failure here."""
    commits = Commits()
    for failure in (ValueError("a bug"), AlreadyExists("the id is taken")):
        write = _Write(failure)
        caller = asyncio.create_task(commits.run(write.run()))
        await write.begun.wait()
        caller.cancel()
        write.may_commit.set()
        await commits.settled(30.0)
        with pytest.raises(asyncio.CancelledError):
            await caller


async def test_write_that_never_ends_is_left_in_doubt_and_said_so() -> None:
    commits, write = Commits(), _Write()
    caller = asyncio.create_task(commits.run(write.run()))
    await write.begun.wait()
    with capture_logs() as logged:
        await commits.settled(0.01)
    assert [(line["event"], line["count"]) for line in logged] == [("writes left in doubt", 1)]
    write.may_commit.set()
    assert await caller == "receipt"


async def test_nothing_under_way_is_settled_at_once() -> None:
    await Commits().settled(30.0)
