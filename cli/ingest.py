"""Stores a stream of records: many at once, each until its outcome is known."""

import asyncio
import random
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Final

from cli.records import BadRecord, Parsed, Record
from memshard import AsyncMemoryClient, MemshardError, Unavailable

_ATTEMPTS: Final = 6
_FIRST_DELAY_S: Final = 0.2
"""Doubled from try to try: six seconds and a half in all, which a failover or a restart of one part stays below."""

_MAX_DELAY_S: Final = 5.0
"""No wait is longer, whatever the service asks for."""

Report = Callable[[Parsed, MemshardError | None], None]
"""Called once for each record when its fate is known: with None when it is stored."""


class GaveUp(Exception):
    """Nothing was stored for as long as one record was tried again and again: the cluster is down, not the record."""

    def __init__(self, error: MemshardError) -> None:
        super().__init__(str(error))
        self.error = error


async def ingest(
    client: AsyncMemoryClient,
    records: Iterator[Parsed],
    report: Report,
    *,
    concurrency: int,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> None:
    """Stores all records, `concurrency` at a time, and reports each. What the records' ids name is stored once.

    Raises GaveUp when the cluster does not answer, and whatever the iterator raises.
    """
    reader = _Reader(records, ahead=2 * concurrency)
    storing = _Storing(client, sleep)

    async def work() -> None:
        while (record := await reader.next()) is not None:
            report(record, None if isinstance(record, BadRecord) else await storing.store(record))

    gave_up: GaveUp | None = None
    try:
        async with asyncio.TaskGroup() as group:
            reader.start()
            for _ in range(concurrency):
                group.create_task(work())
    except* GaveUp as errors:
        gave_up = next(error for error in errors.exceptions if isinstance(error, GaveUp))
    finally:
        reader.stop()
    if gave_up is not None:
        raise gave_up
    if reader.error is not None:
        raise reader.error


class _Storing:
    """Tries a record again while that can help, and notices when it cannot help any record."""

    def __init__(self, client: AsyncMemoryClient, sleep: Callable[[float], Awaitable[None]]) -> None:
        self._client = client
        self._sleep = sleep
        self._answers = 0  # That something was stored, or refused for the record's own sake.
        self._reached = False

    async def store(self, record: Record) -> MemshardError | None:
        """None when the record is stored, else why it is not."""
        answers_before = self._answers
        for attempt in range(_ATTEMPTS):
            try:
                await self._attempt(record)
            except MemshardError as error:
                if not error.retryable:
                    self._answers += 1
                    return error
                failure = error
                if isinstance(error, Unavailable) and not error.reason and not self._reached:
                    raise GaveUp(error) from error  # Nobody was there from the start: say so at once.
                self._reached = True
                if attempt + 1 < _ATTEMPTS:
                    # Jitter, so that the records that failed together do not come back together.
                    delay_s = _FIRST_DELAY_S * 2**attempt * random.uniform(0.75, 1.25)  # noqa: S311 - No secret.
                    await self._sleep(min(max(delay_s, error.retry_after_s or 0.0), _MAX_DELAY_S))
            else:
                self._answers += 1
                self._reached = True
                return None
        if self._answers == answers_before:
            raise GaveUp(failure) from failure
        return failure

    async def _attempt(self, record: Record) -> None:
        await self._client.store(
            record.user_id,
            record.content,
            id=record.id,
            agent_id=record.agent_id,
            session_id=record.session_id,
            type=record.type,
            metadata=record.metadata,
            importance=record.importance,
            embedding=record.embedding,
            embedding_model=record.embedding_model,
            expire_time=record.expire_time,
        )


class _Reader:
    """Reads in a thread of its own, a few records ahead: a slow pipe must not hold up the answers to what is sent."""

    def __init__(self, records: Iterator[Parsed], *, ahead: int) -> None:
        self.error: Exception | None = None
        self._records = records
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Parsed | None] = asyncio.Queue()
        self._room = threading.Semaphore(ahead)  # What bounds the queue.
        self._stopping = False

    def start(self) -> None:
        # A daemon, since nothing can wake a thread that waits for a pipe when the command is to end.
        threading.Thread(target=self._read, name="import-reader", daemon=True).start()

    def stop(self) -> None:
        self._stopping = True
        self._room.release()

    async def next(self) -> Parsed | None:
        """The next record; None, again and again, after the last."""
        record = await self._queue.get()
        if record is None:
            self._queue.put_nowait(None)  # For the next worker.
        else:
            self._room.release()
        return record

    def _read(self) -> None:
        try:
            for record in self._records:
                self._room.acquire()
                if self._stopping or not self._hand_over(record):
                    return
        except Exception as error:
            self.error = error  # Raised by ingest, when the records before it are stored.
        self._hand_over(None)

    def _hand_over(self, record: Parsed | None) -> bool:
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, record)
        except RuntimeError:
            return False  # The loop is closed: the import was stopped while this thread waited for its pipe.
        return True
