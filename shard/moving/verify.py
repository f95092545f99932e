"""Comparing the rows of a range on both sides: every row by its key and a fingerprint of all the rest of it.

While writes go on, the taker is a little behind, so that what differs is looked at again. What has changed since is
known from the giver's log (`shard.moving.changed`), and is compared once more when nobody writes any more.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any
from uuid import UUID

import asyncpg

from shard.moving.changed import Key
from shard.moving.side import Side
from shard.moving.tables import MOVED, Table, describe

_FETCHED = 2000
_ASKED = 2000
# asyncpg gives a vector's type no meaning, and need not: vectors are compared by a fingerprint.

Keys = Mapping[str, set[Key]]


class Verifier:
    """Compares the slots `first` to `last` of a giver with those of a taker, who has the same schema."""

    def __init__(self, giver: Side, taker: Side, first: int, last: int) -> None:
        self._giver = giver
        self._taker = taker
        self._first = first
        self._last = last
        self._tables: dict[str, Table] = {}
        self.rows = 0
        """Rows of the giver's that were compared, of all tables."""

    async def all(self) -> dict[str, set[Key]]:
        """The keys of the rows that one side lacks, or that differ, by table."""
        await self._describe()
        self.rows = 0
        different: dict[str, set[Key]] = {}
        for table in self._tables.values():
            found = await self._compare(table)
            if found:
                different[table.name] = found
        return different

    async def some(self, keys: Keys) -> dict[str, set[Key]]:
        """Those of `keys` whose rows differ now."""
        await self._describe()
        different: dict[str, set[Key]] = {}
        for name, asked in keys.items():
            found = await self._compare_some(self._tables[name], sorted(asked))
            if found:
                different[name] = found
        return different

    async def _describe(self) -> None:
        if not self._tables:
            self._tables = {name: await describe(self._giver.connection, name) for name in MOVED}

    async def _compare(self, table: Table) -> set[Key]:
        """Goes through both sides in the order of the key, side by side."""
        different: set[Key] = set()
        ours, theirs = self._rows(self._giver, table), self._rows(self._taker, table)
        one, other = await asyncio.gather(anext(ours, None), anext(theirs, None))
        while one is not None or other is not None:
            if other is None or (one is not None and one[0] < other[0]):
                assert one is not None
                different.add(_as_text(one[0]))
                self.rows += 1
                one = await anext(ours, None)
            elif one is None or other[0] < one[0]:
                different.add(_as_text(other[0]))
                other = await anext(theirs, None)
            else:
                if one[1] != other[1]:
                    different.add(_as_text(one[0]))
                self.rows += 1
                one, other = await anext(ours, None), await anext(theirs, None)
        return different

    async def _rows(self, side: Side, table: Table) -> AsyncIterator[tuple[tuple[Any, ...], str]]:
        key = ", ".join(table.key)
        statement = (
            f"SELECT {key}, {table.fingerprint} AS fingerprint FROM {table.name} "  # noqa: S608  # The schema's names.
            f"WHERE slot >= $1 AND slot <= $2 ORDER BY {key}"
        )
        async with side.connection.transaction(isolation="repeatable_read", readonly=True):
            cursor = await side.connection.cursor(statement, self._first, self._last)
            while rows := await cursor.fetch(_FETCHED):
                for row in rows:
                    *values, fingerprint = row.values()
                    yield tuple(values), fingerprint

    async def _compare_some(self, table: Table, keys: list[Key]) -> set[Key]:
        different: set[Key] = set()
        for begin in range(0, len(keys), _ASKED):
            asked = keys[begin : begin + _ASKED]
            ours, theirs = await asyncio.gather(
                self._fingerprints(self._giver, table, asked), self._fingerprints(self._taker, table, asked)
            )
            different |= {key for key in asked if ours.get(key) != theirs.get(key)}
        return different

    async def _fingerprints(self, side: Side, table: Table, keys: list[Key]) -> dict[Key, str]:
        columns = [list(column) for column in zip(*keys, strict=True)]
        arrays = ", ".join(f"${number}::text[]" for number in range(1, len(columns) + 1))
        names = ", ".join(f"k{number}" for number in range(len(columns)))
        same = " AND ".join(
            f"{column} = k{number}::{kind}"
            for number, (column, kind) in enumerate(zip(table.key, table.key_types, strict=True))
        )
        statement = (
            f"SELECT {names}, {table.fingerprint} AS fingerprint "  # noqa: S608  # The schema's names.
            f"FROM unnest({arrays}) AS asked ({names}) JOIN {table.name} ON {same}"
        )
        rows: Iterable[asyncpg.Record] = await side.connection.fetch(statement, *columns)
        return {tuple(row.values())[:-1]: row["fingerprint"] for row in rows}


def merged(some: Keys, more: Keys) -> dict[str, set[Key]]:
    """The keys of both."""
    return {name: some.get(name, set()) | more.get(name, set()) for name in some.keys() | more.keys()}


def count(keys: Keys) -> int:
    """How many there are."""
    return sum(map(len, keys.values()))


def _as_text(key: tuple[Any, ...]) -> Key:
    return tuple(_text(value) for value in key)


def _text(value: Any) -> str:
    """As PostgreSQL writes it."""
    if isinstance(value, bytes):
        return "\\x" + value.hex()
    return str(value) if isinstance(value, int | UUID) else value
