"""What is in Redis: whatever is found there is what was sealed for that name, or nothing."""

import os

from hypothesis import given
from hypothesis import strategies as st

from router.consistency import Position
from router.envelope import ENTRY, HIGHEST, MARKER, Envelopes, Opened, header

_ENVELOPES = Envelopes(b"k" * 32)
_shards = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", fullmatch=True)
_positions = st.builds(Position, st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1))
_payloads = st.one_of(st.binary(max_size=2_000), st.binary(max_size=20).map(lambda part: part * 200))


@given(st.text(max_size=40), _shards, _positions, _payloads)
def test_what_was_sealed_is_opened(name: str, shard_id: str, position: Position, payload: bytes) -> None:
    sealed = _ENVELOPES.seal(name, shard_id, position, payload)
    assert _ENVELOPES.open(name, sealed) == Opened(shard_id, position, payload)


@given(_payloads, st.data())
def test_what_was_changed_anywhere_is_nothing(payload: bytes, data: st.DataObject) -> None:
    sealed = bytearray(_ENVELOPES.seal("name", "shard-0", Position(1, 100), payload))
    at = data.draw(st.integers(0, len(sealed) - 1))
    sealed[at] ^= data.draw(st.integers(1, 255))
    assert _ENVELOPES.open("name", bytes(sealed)) is None


@given(_payloads, st.data())
def test_what_was_cut_off_or_added_to_is_nothing(payload: bytes, data: st.DataObject) -> None:
    sealed = _ENVELOPES.seal("name", "shard-0", Position(1, 100), payload)
    assert _ENVELOPES.open("name", sealed[: data.draw(st.integers(0, len(sealed) - 1))]) is None
    assert _ENVELOPES.open("name", sealed + data.draw(st.binary(min_size=1, max_size=9))) is None


@given(st.one_of(st.binary(max_size=300), st.binary(max_size=300).map(lambda rest: ENTRY + rest)))
def test_garbage_is_nothing(found: bytes) -> None:
    assert _ENVELOPES.open("name", found) is None


def test_what_is_no_entry_is_nothing() -> None:
    for found in (None, 7, "text", [b"list"], header(MARKER, "shard-0", HIGHEST)):
        assert _ENVELOPES.open("name", found) is None


def test_an_entry_is_of_one_name_and_one_cluster() -> None:
    sealed = _ENVELOPES.seal("name", "shard-0", Position(1, 100), b"payload")
    assert _ENVELOPES.open("another", sealed) is None
    assert Envelopes(b"o" * 32).open("name", sealed) is None


def test_what_can_be_packed_is_and_what_cannot_is_not() -> None:
    text, noise = b"the same words again and again, " * 100, os.urandom(3_000)
    assert len(_ENVELOPES.seal("name", "shard-0", HIGHEST, text)) < len(text) / 4
    assert len(_ENVELOPES.seal("name", "shard-0", HIGHEST, noise)) < len(noise) + 100


def test_positions_compare_as_text_as_they_do_as_numbers() -> None:
    positions = [Position(1, 9), Position(1, 10), Position(2, 1), Position(10, 0), HIGHEST]
    headers = [header(ENTRY, "shard-0", position) for position in positions]
    assert sorted(headers) == headers
    assert len({len(one) for one in headers}) == 1


@given(st.lists(st.text(max_size=5), min_size=1, max_size=4), st.lists(st.text(max_size=5), min_size=1, max_size=4))
def test_a_name_stands_for_its_parts_alone(one: list[str], other: list[str]) -> None:
    assert (_ENVELOPES.digest(*one) == _ENVELOPES.digest(*other)) is (one == other)
