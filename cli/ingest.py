"""Stores a stream of records in batches: several at once, each record until its outcome is known."""

import asyncio
import random
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Final

from cli.records import BadRecord, Parsed, Record
from memshard import AlreadyExists, AsyncMemoryClient, InvalidArgument, MemshardError, NewMemory, Unavailable

MAX_BATCH: Final = 100
"""Most records in one call: enough that the way there and back costs little, few enough for a short answer."""

_SHARE_BYTES: Final = 8 * 1024
"""What a record takes of a batch of MAX_BATCH, or a multiple of it: a batch is far below the contract's 8 MiB."""

_ATTEMPTS: Final = 6
_FIRST_DELAY_S: Final = 0.2
"""Doubled from try to try: six seconds and a half in all, which a failover or a restart of one part stays below."""

_MAX_DELAY_S: Final = 5.0
"""No wait is longer, whatever the service asks for."""

DELETED: Final = "DELETED"
"""Reason of a record that was stored before and has been deleted since, which the service answers with success."""

_DELETED: Final = AlreadyExists("was deleted within the last 24 hours", reason=DELETED)

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
    """Stores all records, `concurrency` calls at a time, and reports each. What the records' ids name is stored once.

    Raises GaveUp when the cluster does not answer, and whatever the iterator raises.
    """
    reader = _Reader(records, ahead=2 * concurrency * MAX_BATCH)
    storing = _Storing(client, sleep)

    async def work() -> None:
        while batch := await reader.next_batch():
            for bad in batch:
                if isinstance(bad, BadRecord):
                    report(bad, None)
            await storing.store([record for record in batch if isinstance(record, Record)], report)

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
    """Tries records again while that can help, and notices when it cannot help any record."""

    def __init__(self, client: AsyncMemoryClient, sleep: Callable[[float], Awaitable[None]]) -> None:
        self._client = client
        self._sleep = sleep
        self._answers = 0  # That something was stored, or refused for the record's own sake.
        self._reached = False

    async def store(self, records: Sequence[Record], report: Report) -> None:
        """Stores the records and reports each; raises GaveUp when nothing at all can be stored."""
        answers_before = self._answers
        for attempt in range(_ATTEMPTS):
            failed: list[tuple[Record, MemshardError]] = []
            for record, error in await self._attempt(records):
                if error is not None and error.retryable:
                    failed.append((record, error))
                else:
                    self._answers += 1
                    report(record, error)
            if not failed:
                return
            records = [record for record, _ in failed]
            if attempt + 1 < _ATTEMPTS:
                # Jitter, so that the records that failed together do not come back together.
                delay_s = _FIRST_DELAY_S * 2**attempt * random.uniform(0.75, 1.25)  # noqa: S311 - No secret.
                asked_s = max(error.retry_after_s or 0.0 for _, error in failed)
                await self._sleep(min(max(delay_s, asked_s), _MAX_DELAY_S))
        if self._answers == answers_before:
            raise GaveUp(failed[0][1]) from failed[0][1]
        for record, error in failed:
            report(record, error)

    async def _attempt(self, records: Sequence[Record]) -> list[tuple[Record, MemshardError | None]]:
        """What became of each record in one try."""
        if not records:
            return []
        try:
            result = await self._client.store_many([_new_memory(record) for record in records])
        except InvalidArgument as error:
            if len(records) == 1:
                return [(records[0], error)]
            # Nothing was sent, since one of them cannot be: the others must not go with it.
            middle = len(records) // 2
            return await self._attempt(records[:middle]) + await self._attempt(records[middle:])
        except MemshardError as error:
            if isinstance(error, Unavailable) and not error.reason and not self._reached:
                raise GaveUp(error) from error  # Nobody was there from the start: say so at once.
            self._reached = True
            return [(record, error) for record in records]
        self._reached = True
        return [
            (record, _DELETED if outcome.deleted else outcome.error)
            for record, outcome in zip(records, result.outcomes, strict=True)
        ]


def _new_memory(record: Record) -> NewMemory:
    return NewMemory(
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


def _shares(record: Parsed) -> int:
    """How many of the MAX_BATCH shares of a batch a record takes, by its size on the wire, guessed high."""
    if isinstance(record, BadRecord):
        return 1
    metadata_bytes = len(repr(record.metadata)) if record.metadata else 0
    size_bytes = 4 * (len(record.content) + metadata_bytes + len(record.embedding or ()))
    return min(1 + size_bytes // _SHARE_BYTES, MAX_BATCH)


class _Reader:
    """Reads in a thread of its own, a few records ahead: a slow pipe must not hold up the answers to what is sent."""

    def __init__(self, records: Iterator[Parsed], *, ahead: int) -> None:
        self.error: Exception | None = None
        self._records = records
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[Parsed, int] | None] = asyncio.Queue()  # Each with its shares.
        self._room = threading.Semaphore(ahead)  # What bounds the queue.
        self._stopping = False

    def start(self) -> None:
        # A daemon, since nothing can wake a thread that waits for a pipe when the command is to end.
        threading.Thread(target=self._read, name="import-reader", daemon=True).start()

    def stop(self) -> None:
        self._stopping = True
        self._room.release(MAX_BATCH)  # As much as any record waits for.

    async def next_batch(self) -> list[Parsed]:
        """Waits for a record and takes those that are there already with it; empty after the last."""
        batch: list[Parsed] = []
        shares = 0
        while shares < MAX_BATCH:
            if batch and self._queue.empty():
                break  # A slow pipe must not hold up what it has given already.
            item = await self._queue.get()
            if item is None:
                self._queue.put_nowait(None)  # For the next worker.
                break
            batch.append(item[0])
            shares += item[1]
            self._room.release(item[1])
        return batch

    def _read(self) -> None:
        try:
            for record in self._records:
                shares = _shares(record)
                for _ in range(shares):
                    self._room.acquire()
                if self._stopping or not self._hand_over((record, shares)):
                    return
        except Exception as error:
            self.error = error  # Raised by ingest, when the records before it are stored.
        self._hand_over(None)

    def _hand_over(self, item: tuple[Parsed, int] | None) -> bool:
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)
        except RuntimeError:
            return False  # The loop is closed: the import was stopped while this thread waited for its pipe.
        return True
