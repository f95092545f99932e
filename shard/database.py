"""The pool of connections to the shard's own database, and what its failures mean to a caller."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import asyncpg
from pgvector.asyncpg import register_vector

from common.config import ReplicaSettings, ShardSettings
from common.deadline import Deadline
from common.errors import InvalidArgument, OutcomeUnknown, Unavailable
from common.postgres import CANNOT_NOW, CONNECT_TIMEOUT_S, CONNECTION_LOST, Connection, Pool
from shard.primary import Primary, PrimaryConnection, timeline_of
from shard.timed_connection import LONGEST_S, TimedConnection

if TYPE_CHECKING:
    from asyncpg.pool import PoolConnectionProxy

# Seconds after which a caller may try again: a primary that was killed is back in about one.
_RETRY_AFTER_S = 1.0
# Between attempts to connect to a primary that is there and does not let us in.
_CONNECT_PAUSE_S = 0.05
# Kept back from a caller's deadline, so that it hears what the matter was.
_ANSWER_MARGIN_S = 0.05
# What the server warns with when a commit stops waiting for standbys: after a cancel request, and when it shuts down
# (PostgreSQL's syncrep.c). The first is the code of all warnings; none other is known that a write here could meet.
_WAIT_CUT_SHORT = {"01000", "57P01"}

# Seconds in which connections are not replaced twice because somebody asks for it.
_RECYCLED_FOR_S = 60.0


class Database:
    """Connections to the shard's database, with the two kinds of use that fail differently: reads and writes.

    Writes may not take all connections: one that waits for a fence, its caller long gone, must not keep readers out.
    With a `primary` all connections are to that, and while there is none callers wait `primary_wait_s` for one.
    """

    def __init__(self, pool: Pool, primary: Primary | None = None, *, primary_wait_s: float = 0.0) -> None:
        self._pool = pool
        self._primary = primary
        self._primary_wait_s = primary_wait_s
        self._writes = asyncio.Semaphore(max(1, pool.get_max_size() * 3 // 4))
        self._lent: set[PoolConnectionProxy[asyncpg.Record]] = set()
        self._recycled_at = -_RECYCLED_FOR_S
        self._answered_at = time.monotonic()
        if primary is not None:
            primary.on_change(self._leave_outdated)

    @asynccontextmanager
    async def reading(self, deadline: Deadline) -> AsyncIterator[Connection]:
        """A connection for a read, or work that may be done again. A lost one is Unavailable: any retry is safe.

        Raises TimeoutError as well when the server has ended a statement because its time was up.
        """
        connection = await self._acquire(deadline)
        finished = False
        try:
            with _explained():
                yield connection
            finished = True
        except asyncpg.QueryCanceledError as error:
            raise _timed_out() from error
        except CONNECTION_LOST as error:
            raise _unavailable() from error
        finally:
            await self._release(connection, finished=finished)

    async def to_write(self, deadline: Deadline) -> "WriteConnection":
        """A connection for one write. Whoever gets it must enter it, which gives it back at the end.

        Raises Unavailable, TimeoutError.
        """
        async with deadline.bound():
            await self._writes.acquire()
        try:
            connection = await self._acquire(deadline)
        except BaseException:
            self._writes.release()
            raise
        return WriteConnection(connection, self._give_back)

    def use(self) -> tuple[int, int]:
        """How many connections there may be, and how many of them are in use."""
        return self._pool.get_max_size(), len(self._lent)

    @property
    def is_full(self) -> bool:
        """Whether all the connections that there may be are in use."""
        there_may_be, in_use = self.use()
        return in_use >= there_may_be

    @property
    def silent_s(self) -> float:
        """Seconds since the database last answered anybody. Of one that nobody asks that says nothing."""
        return time.monotonic() - self._answered_at

    @property
    def open_connections(self) -> int:
        """How many are open, in use or not."""
        count: int = self._pool.get_size()
        return count

    async def recycle(self) -> int:
        """Has every connection replaced, those in use once they are given back; how many there were."""
        there_were: int = self._pool.get_size()
        await self._pool.expire_connections()
        return there_were

    async def recycle_on_request(self) -> int:
        """The same, at most once a minute: each router finds for itself that something is wrong. 0 is too soon."""
        now = asyncio.get_running_loop().time()
        if now - self._recycled_at < _RECYCLED_FOR_S:
            return 0
        self._recycled_at = now
        return await self.recycle()

    async def _give_back(
        self, connection: "PoolConnectionProxy[asyncpg.Record]", *, finished: bool, read_only: bool
    ) -> None:
        try:
            if read_only:
                await self._pool.expire_connections()
                if self._primary is not None:
                    self._primary.doubt()
            await self._release(connection, finished=finished)
        finally:
            self._writes.release()

    async def _acquire(self, deadline: Deadline) -> "PoolConnectionProxy[asyncpg.Record]":
        patience = Deadline.after(min(self._primary_wait_s, deadline.less(_ANSWER_MARGIN_S).remaining_s()))
        while True:
            try:
                if self._primary is not None and not self._primary.is_available:
                    await self._primary.available(patience.remaining_s())
                connection = await self._lend(deadline)
            except (*CONNECTION_LOST, *CANNOT_NOW) as error:
                if not patience.remaining_s():
                    raise _unavailable() from error
                await asyncio.sleep(_CONNECT_PAUSE_S)
                continue
            if not self._is_outdated(connection):
                return connection
            await self._pool.expire_connections()
            await self._release(connection, finished=True)

    async def _lend(self, deadline: Deadline) -> "PoolConnectionProxy[asyncpg.Record]":
        # Not the pool's own timeout, which takes a task for each connection that is lent.
        async with deadline.bound():
            connection = await self._pool.acquire()
        self._lent.add(connection)
        try:
            timed: Any = connection  # The pool's proxy has the methods of what it was told to make.
            await timed.limit_statements(deadline.remaining_s())
        except BaseException:
            await self._release(connection, finished=False)
            raise
        return connection

    async def _release(self, connection: "PoolConnectionProxy[asyncpg.Record]", *, finished: bool) -> None:
        self._lent.discard(connection)
        if finished:
            self._answered_at = time.monotonic()
        else:
            timed: Any = connection
            # One that has died was taken from under its user, and there is nothing behind this one any more.
            with suppress(AttributeError):
                timed.leave_midway()
        # A connection that died cannot be tidied up. The pool replaces it, and its complaint must not take the place
        # of the error that the caller is about to see.
        with suppress(*CONNECTION_LOST):
            await self._pool.release(connection)

    def _is_outdated(self, connection: Connection) -> bool:
        """Whether the server at the other end has a successor."""
        return self._primary is not None and timeline_of(connection) < self._primary.timeline

    def _leave_outdated(self) -> None:
        """Ends what is under way on a server that has a successor: a commit there may wait for ever."""
        for connection in [lent for lent in self._lent if self._is_outdated(lent)]:
            # The pool takes a connection that has died from under its user, who has not given it back yet.
            with suppress(asyncpg.InterfaceError):
                connection.terminate()


class WriteConnection:
    """`async with` it: a write that commits by itself. One whose fate is not known is OutcomeUnknown.

    One of which the server has ended a statement, never a commit, is TimeoutError.
    """

    def __init__(self, connection: "PoolConnectionProxy[asyncpg.Record]", give_back: "_GiveBack") -> None:
        self._connection = connection
        self._give_back = give_back

    @asynccontextmanager
    async def entered(self) -> AsyncIterator[Connection]:
        """The connection, given back at the end."""
        warnings: list[Any] = []
        finished = read_only = False
        try:
            with _explained(), _listening(self._connection, warnings):
                yield self._connection
            finished = True
            if any(map(_leaves_in_doubt, warnings)):
                raise _in_doubt("the wait for a standby was cut short")
        except asyncpg.QueryCanceledError as error:
            # The statement has no effect. An earlier one of the same write may have: the same request settles it.
            raise _timed_out() from error
        except CONNECTION_LOST as error:
            raise _in_doubt("the database went away during the write") from error
        except Unavailable as error:
            read_only = isinstance(error.__cause__, asyncpg.ReadOnlySQLTransactionError)
            raise
        finally:
            await self._give_back(self._connection, finished=finished, read_only=read_only)


class _GiveBack(Protocol):
    async def __call__(
        self, connection: "PoolConnectionProxy[asyncpg.Record]", *, finished: bool, read_only: bool
    ) -> None: ...


async def open_pool(
    settings: ShardSettings | ReplicaSettings, application_name: str, primary: Primary | None = None
) -> Pool:
    """The pool that serves requests, as the role that can only read and write rows: to the primary, if one is given."""
    lock_timeout_s = settings.lock_timeout_s if isinstance(settings, ShardSettings) else LONGEST_S
    where: dict[str, Any] = {"connection_class": TimedConnection}
    if primary is not None:
        where = {"connect": partial(_to_primary, primary), "connection_class": PrimaryConnection}
    return await asyncpg.create_pool(
        settings.database_dsn.get_secret_value(),
        **where,
        min_size=settings.pool_min_connections,
        max_size=settings.pool_max_connections,
        init=_prepare,
        reset=settle,
        timeout=CONNECT_TIMEOUT_S,
        server_settings={
            "application_name": application_name,
            # What receipts promise, and what the statements rely on, whatever the database's own defaults are.
            "synchronous_commit": "on",
            "default_transaction_isolation": "read committed",
            # How the server says that it gave up waiting for a standby.
            "client_min_messages": "warning",
            # A write that waits for a fence gives up before its commit begins, and may be sent again.
            "lock_timeout": f"{lock_timeout_s:.3f}s",
            # No statement here takes a second. One that does not end must not keep its connection for ever.
            "statement_timeout": f"{LONGEST_S}s",
        },
    )


async def close_pool(pool: Pool) -> None:
    """Closes the pool politely, or not at all politely when the database does not answer."""
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            await pool.close()
    except TimeoutError:
        pool.terminate()


async def _to_primary(
    primary: Primary, dsn: str, *, connection_class: type[PrimaryConnection], **options: Any
) -> PrimaryConnection:
    """How the pool connects. The primary knows the URL, and makes connections of that class."""
    return await primary.connect(**options)


async def _prepare(connection: "asyncpg.Connection[asyncpg.Record]") -> None:
    await register_vector(connection)


async def settle(connection: Connection | None) -> None:
    """Instead of asyncpg's reset, which costs a round trip each time: no statement here changes a session's state.

    The pool hands over None when the connection has died on its way back.
    """
    timed: Any = connection
    if timed is not None:
        await timed.settle()


@contextmanager
def _listening(connection: Connection, warnings: list[Any]) -> Iterator[None]:
    """Collects what the server says besides its answers."""

    def hear(_: object, message: object) -> None:
        warnings.append(message)

    connection.add_log_listener(hear)
    try:
        yield
    finally:
        # One that died meanwhile has nothing to be removed from.
        with suppress(asyncpg.InterfaceError):
            connection.remove_log_listener(hear)


def _leaves_in_doubt(message: Any) -> bool:
    """Whether the server says that a commit stopped waiting for its standbys: it is there, and may yet be lost."""
    severity = message.severity_en or message.severity
    return severity == "WARNING" and message.sqlstate in _WAIT_CUT_SHORT


def _in_doubt(why: str) -> OutcomeUnknown:
    return OutcomeUnknown(f"{why}; the same request again settles whether it happened", retry_after_s=_RETRY_AFTER_S)


@contextmanager
def _explained() -> Iterator[None]:
    """What the server itself says of a statement that it did not carry out, in domain errors."""
    try:
        yield
    except asyncpg.LockNotAvailableError as error:
        raise Unavailable(
            "the memory's slot is held by something else at the moment",
            reason="SLOT_BUSY",
            retry_after_s=_RETRY_AFTER_S,
        ) from error
    except CANNOT_NOW as error:
        raise _unavailable() from error
    except (asyncpg.DataError, asyncpg.ProgramLimitExceededError) as error:
        # Routers check what comes from agents; this is what came past them.
        raise InvalidArgument("a value in the request does not fit the database", reason="BAD_VALUE") from error


def _timed_out() -> TimeoutError:
    """The same as when the time is up on this side: DEADLINE_EXCEEDED. The database answers, and is not to blame."""
    return TimeoutError("the server has ended the statement")


def _unavailable() -> Unavailable:
    return Unavailable(
        "the shard's database does not answer", reason="DATABASE_UNAVAILABLE", retry_after_s=_RETRY_AFTER_S
    )
