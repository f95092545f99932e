"""Which rows have changed since the comparison began: read from the publisher's log, through a slot of its own.

Only keys are taken from it. What the messages are: PostgreSQL 18, "Logical Replication Message Formats", protocol 1.
"""

import struct
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

import asyncpg

from shard.moving.side import Side
from shard.moving.streams import StreamError, drop_slot, make_slot
from shard.moving.tables import MARKS

# Changes that one statement decodes.
_BATCH = 20_000

# Where decoding begins moves on only with a snapshot of the running transactions, which is logged every 15 seconds.
_LOG_SNAPSHOT = "SELECT pg_log_standby_snapshot()"
_TAKE = """
SELECT data FROM pg_logical_slot_get_binary_changes($1, NULL, $3, 'proto_version', '1', 'publication_names', $2)
"""

# A row by its key's columns, as text.
Key = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ChangeLog:
    """The changes of what `publication` publishes, from the moment that the log was made."""

    publisher: Side
    publication: str

    @property
    def name(self) -> str:
        """Name of its slot."""
        return f"{self.publication}_changes"

    async def make(self) -> None:
        """Begins anew."""
        await self.remove()
        await make_slot(self.publisher, self.name)

    async def take(self) -> dict[str, set[Key]]:
        """The keys of all rows that have changed since the last time, by table. Raises StreamError."""
        changed: defaultdict[str, set[Key]] = defaultdict(set)
        while True:
            rows = await self.publisher.connection.fetch(_TAKE, self.name, self.publication, _BATCH)
            for table, keys in keys_of(row["data"] for row in rows).items():
                changed[table] |= keys
            # The bound is checked at the end of a transaction only: fewer than it is the end.
            if len(rows) < _BATCH:
                changed.pop(MARKS, None)
                return dict(changed)

    async def shorten(self) -> None:
        """Has the `take` after the next begin later in the log, if the role may have that done, once this is on the
        disk.
        """
        with suppress(asyncpg.InsufficientPrivilegeError):
            await self.publisher.connection.execute(_LOG_SNAPSHOT)

    async def remove(self) -> None:
        """Drops the slot, if there is one."""
        await drop_slot(self.publisher, self.name)


def keys_of(messages: Iterable[bytes]) -> Mapping[str, set[Key]]:
    """The keys of the rows that are inserted, updated and deleted, by table. Raises StreamError for a TRUNCATE,
    of which nobody can say what it removed.
    """
    relations: dict[int, _Relation] = {}
    keys: defaultdict[str, set[Key]] = defaultdict(set)
    for message in messages:
        reader = _Reader(message)
        kind = reader.byte()
        if kind == b"R":
            relation = reader.relation()
            relations[relation.oid] = relation
        elif kind in (b"I", b"U", b"D"):
            relation = relations[reader.int32()]
            # Of an update that changes the key, the old row comes first.
            while not reader.at_end:
                reader.byte()
                values = reader.row()
                keys[relation.name].add(tuple(values[column] or "" for column in relation.key))
        elif kind == b"T":
            raise StreamError("a table was truncated while slots of it moved")
    return keys


@dataclass(slots=True)
class _Relation:
    oid: int
    name: str
    key: list[int] = field(default_factory=list)


class _Reader:
    def __init__(self, message: bytes) -> None:
        self._message = message
        self._at = 0

    @property
    def at_end(self) -> bool:
        return self._at >= len(self._message)

    def byte(self) -> bytes:
        return self._take(1)

    def int16(self) -> int:
        return int(struct.unpack(">h", self._take(2))[0])

    def int32(self) -> int:
        return int(struct.unpack(">I", self._take(4))[0])

    def text(self) -> str:
        end = self._message.index(b"\0", self._at)
        value = self._message[self._at : end].decode()
        self._at = end + 1
        return value

    def relation(self) -> _Relation:
        oid, _, name = self.int32(), self.text(), self.text()
        self.byte()
        relation = _Relation(oid, name)
        for column in range(self.int16()):
            if self.byte() == b"\x01":
                relation.key.append(column)
            self.text()
            self._take(8)
        return relation

    def row(self) -> list[str | None]:
        return [self._value() for _ in range(self.int16())]

    def _value(self) -> str | None:
        # Null, or an out-of-line value that has not changed; a key has neither.
        if self.byte() in (b"n", b"u"):
            return None
        return self._take(self.int32()).decode()

    def _take(self, count: int) -> bytes:
        taken = self._message[self._at : self._at + count]
        self._at += count
        return taken
