"""Location entries: what is written is read; whatever else is found under a key is nothing, and no error."""

import asyncio
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from common.config import RouterSettings
from common.slots import SLOT_COUNT
from common.telemetry.registry import REGISTRY
from memshard.ids import new_id
from router.location import NOWHERE, LocationCache, parse, render
from tests.support.spans import Spans

_slots = st.integers(0, SLOT_COUNT - 1)


@given(st.frozensets(_slots, min_size=1, max_size=8))
def test_entry_is_read_as_it_was_written(slots: frozenset[int]) -> None:
    assert parse(render(slots).encode()) == slots


def test_entry_is_the_same_text_for_the_same_slots() -> None:
    assert render({30, 4, 200}) == render([200, 30, 4]) == "4,30,200"


@given(st.binary(max_size=64) | st.text(alphabet="0123456789,-+_ \0٣", max_size=64).map(str.encode))
def test_garbage_is_slots_or_nothing(entry: bytes) -> None:
    assert all(0 <= slot < SLOT_COUNT for slot in parse(entry))


@pytest.mark.parametrize(
    "entry",
    [
        *(
            None,
            b"",
            b",",
            b"1,",
            b",1",
            b"1,,2",
            b"-1",
            b"+1",
            b" 1",
            b"1\n",
            b"1_0",
            b"1.5",
            b"0x1",
            "\u0663".encode(),
        ),
        *(b"16384", b"1,16384", b"99999", b"000001", b"9" * 5000, b"1,2,3,4,5,6,7,8,9", "12", 12, True, [b"1"]),
    ],
)
def test_entry_that_is_not_ours_is_nothing(entry: object) -> None:
    assert parse(entry) == NOWHERE


def test_entry_that_is_ours_is_followed() -> None:
    assert parse(b"0") == {0}
    assert parse(b"16383,7,7") == {7, 16383}


# The router's own memory, with no Redis behind it.


def _cache(entries: int) -> LocationCache:
    return LocationCache(RouterSettings(catalog_dsn=SecretStr("postgresql://nowhere"), location_cache_entries=entries))


async def test_what_was_stored_learned_or_forgotten_is_remembered() -> None:
    cache = _cache(10)
    fresh = new_id()
    assert await cache.find(fresh) == NOWHERE
    await cache.add(fresh, 1, since=cache.moment())
    await cache.add(fresh, 2, since=cache.moment())  # Another user has a memory with the same id.
    assert await cache.find(fresh) == {1, 2}
    await cache.learn(fresh, frozenset((2,)), since=cache.moment())
    assert await cache.find(fresh) == {2}
    await cache.forget(fresh)
    await cache.forget(fresh)
    assert await cache.find(fresh) == NOWHERE


async def test_an_old_id_is_added_to_what_is_known_and_never_begins_an_entry() -> None:
    """Others may have it already: an entry with one slot would hide theirs."""
    cache = _cache(10)
    for old in (str(uuid.uuid4()), "0190b5a4-7b3c-7def-8123-456789abcdef"):
        await cache.add(old, 1, since=cache.moment())
        assert await cache.find(old) == NOWHERE
        await cache.learn(old, frozenset((1,)), since=cache.moment())
        await cache.add(old, 2, since=cache.moment())
        assert await cache.find(old) == {1, 2}


async def test_memory_is_bounded() -> None:
    cache = _cache(10)
    ids = [new_id() for _ in range(25)]
    for i in range(25):
        await cache.add(ids[i], i, since=cache.moment())
    found = [i for i in range(25) if await cache.find(ids[i])]
    assert found == list(range(15, 25))


async def test_router_may_remember_nothing_at_all() -> None:
    cache = _cache(0)
    fresh = new_id()
    await cache.add(fresh, 1, since=cache.moment())
    await cache.learn(fresh, frozenset((1,)), since=cache.moment())
    assert await cache.find(fresh) == NOWHERE
    await cache.forget(fresh)


async def test_a_place_learnt_before_a_forgetting_is_not_remembered_after_it() -> None:
    cache = _cache(10)
    fresh = new_id()
    began = cache.moment()
    cache.drop([fresh])
    await cache.add(fresh, 1, since=began)
    assert await cache.find(fresh) == NOWHERE
    await cache.learn(fresh, frozenset((1,)), since=began)
    assert await cache.find(fresh) == NOWHERE


async def test_nothing_is_remembered_while_the_memory_is_not_believed() -> None:
    """It would be believed again later, and nobody has said what to forget meanwhile."""
    believes = False
    settings = RouterSettings(catalog_dsn=SecretStr("postgresql://nowhere"))
    cache = LocationCache(settings, believes=lambda: believes)
    fresh = new_id()
    await cache.add(fresh, 1, since=cache.moment())
    await cache.learn(fresh, frozenset((1,)), since=cache.moment())
    believes = True
    assert await cache.find(fresh) == NOWHERE


def _looks() -> Counter[tuple[str, str]]:
    """Looks into the two layers so far, by layer and result."""
    keys = [(layer, result) for layer in ("memory", "redis") for result in ("hit", "miss", "unavailable")]

    def count(layer: str, result: str) -> int:
        labels = {"layer": layer, "result": result}
        return int(REGISTRY.get_sample_value("memory_cache_requests_total", labels) or 0)

    return Counter({key: count(*key) for key in keys})


async def test_what_a_store_looks_up_is_no_look_of_a_read(spans: Spans) -> None:
    cache, old = _cache(10), str(uuid.uuid4())
    before = _looks()
    with spans.call() as storing:
        await cache.add(old, 1, since=cache.moment())
    assert _looks() == before
    assert "memshard.cache.hit" not in storing.attributes
    with spans.call() as reading:
        await cache.find(old)
    assert _looks() - before == {("memory", "miss"): 1}
    assert reading.attributes["memshard.cache.hit"] is False


@pytest.mark.parametrize("off", [{"location_cache_entries": 0}, {}])
async def test_a_look_into_a_cache_that_is_off_is_no_miss(off: dict[str, int], spans: Spans) -> None:
    """Without Redis a router hears nobody, and so believes nothing that it remembers: what it misses is no cache's."""
    settings = RouterSettings(catalog_dsn=SecretStr("postgresql://nowhere"), **off)  # type: ignore[arg-type]
    cache = LocationCache(settings, believes=lambda: bool(off))
    before = _looks()
    with spans.call() as reading:
        assert await cache.find(new_id()) == NOWHERE
    assert _looks() == before
    assert [layer.hit_ratio for layer in cache.layers] == [None]
    assert "memshard.cache.hit" not in reading.attributes


# A Redis that answers something else than it is asked.


@asynccontextmanager
async def _answering(reply: bytes) -> AsyncIterator[str]:
    """The URL of a server that gives this to each command, whatever it says."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                count = int((await reader.readuntil(b"\r\n"))[1:])  # Commands are arrays of byte strings.
                for _ in range(count):
                    size = int((await reader.readuntil(b"\r\n"))[1:])
                    await reader.readexactly(size + 2)
                writer.write(reply)
                await writer.drain()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"


@pytest.mark.parametrize(
    "reply",
    [
        pytest.param(b"*0\r\n", id="nothing"),
        pytest.param(b"*3\r\n$1\r\n7\r\n$1\r\n8\r\n$1\r\n9\r\n", id="too much"),
        pytest.param(b"*-1\r\n", id="null"),
        pytest.param(b":1\r\n", id="a number"),
    ],
)
async def test_a_store_is_remembered_whatever_redis_answers_to_that(reply: bytes) -> None:
    """It has happened: an answer of the wrong shape may not make of it an error."""
    async with _answering(reply) as url:
        settings = RouterSettings(catalog_dsn=SecretStr("postgresql://nowhere"), redis_url=SecretStr(url))
        cache = LocationCache(settings)
        try:
            first, second = new_id(), new_id()
            assert await cache.add(first, 1, since=cache.moment()) is False
            assert await cache.add_many([(first, 1), (second, 2)], since=cache.moment()) == []
            assert await cache.find(second) == {2}
        finally:
            await cache.close()
