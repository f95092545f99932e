"""Something else than PostgreSQL's messages comes instead of the database's answers: it is as if it were away."""

import asyncio
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import pytest

from common.deadline import Deadline
from common.errors import OutcomeUnknown, Unavailable
from shard.database import Database
from shard.timed_connection import TimedConnection
from tests.support.cluster import LocalCluster


def _message(kind: bytes, body: bytes = b"") -> bytes:
    """A message of PostgreSQL's protocol: its kind, its length, its body."""
    return kind + struct.pack("!i", len(body) + 4) + body


# Descriptions of rows, rows, errors and parameters that break off; an error of a kind that there is none of.
_GARBLED = {
    "rows": _message(b"T"),
    "row": _message(b"1") + _message(b"2") + _message(b"D", b"\0"),
    "parameters": _message(b"t"),
    "text": _message(b"E", b"SERROR\0M\xff\xfe\0\0"),
    "error": _message(b"E", b"SERROR\0VERROR\0C~~~~~\0M?\0\0") + _message(b"Z", b"I"),
    "status": _message(b"Z"),
}


class _Between:
    """Passes bytes to and fro; once there is a `reply`, whatever is asked gets that and does not reach the server."""

    def __init__(self) -> None:
        self.reply = b""

    @asynccontextmanager
    async def before(self, dsn: str) -> AsyncIterator[str]:
        """The DSN by which the database is reached through this."""
        there = urlsplit(dsn)

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            database, to_database = await asyncio.open_connection(there.hostname, there.port)
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._pass(reader, to_database, writer))
                    group.create_task(self._pass(database, writer))
            except* OSError:
                pass
            finally:
                writer.close()
                to_database.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server:
            yield urlunsplit(there._replace(netloc=there.netloc.replace(f":{there.port}", f":{port}")))

    async def _pass(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, asking: asyncio.StreamWriter | None = None
    ) -> None:
        while data := await reader.read(65536):
            if asking is not None and self.reply:
                asking.write(self.reply)
            else:
                writer.write(data)
        writer.close()


@pytest.mark.parametrize("what", _GARBLED)
async def test_an_answer_that_is_none_is_a_database_that_is_away(cluster: LocalCluster, what: str) -> None:
    between = _Between()
    async with (
        between.before(cluster.shard_dsn("shard-0")) as dsn,
        asyncpg.create_pool(dsn, min_size=1, max_size=1, connection_class=TimedConnection) as pool,
    ):
        here = Database(pool)
        for writes in (False, True):
            between.reply = b""
            async with here.reading(Deadline.after(10)) as connection:
                # Once prepared, a statement is answered by rows alone.
                assert await connection.fetchval("SELECT $1::int", 1) == 1
            between.reply = _GARBLED[what]
            deadline = Deadline.after(2)
            if writes:
                with pytest.raises(OutcomeUnknown):
                    async with (await here.to_write(deadline)).entered() as connection, deadline.bound():
                        await connection.fetchval("SELECT $1::int", 2)
            else:
                with pytest.raises(Unavailable):
                    async with here.reading(deadline) as connection, deadline.bound():
                        await connection.fetchval("SELECT $1::int", 2)
        between.reply = b""
        async with here.reading(Deadline.after(10)) as connection:
            assert await connection.fetchval("SELECT $1::int", 3) == 3
