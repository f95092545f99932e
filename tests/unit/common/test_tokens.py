"""Sealed tokens: what was sealed comes out; anything else is refused."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from common.tokens import BadTokenError, TokenSealer

_KEY = bytes(range(32))
_PAYLOADS = st.binary(max_size=64)


@given(st.text(), _PAYLOADS, _PAYLOADS)
def test_token_opens_to_its_payload(purpose: str, payload: bytes, bound_to: bytes) -> None:
    sealer = TokenSealer(_KEY)
    assert sealer.open(purpose, sealer.seal(purpose, payload, bound_to), bound_to) == payload


@given(_PAYLOADS, st.data())
def test_token_with_any_bit_flipped_is_refused(payload: bytes, data: st.DataObject) -> None:
    token = bytearray(TokenSealer(_KEY).seal("page", payload, b"listing"))
    token[data.draw(st.integers(0, len(token) - 1))] ^= data.draw(st.integers(1, 255))
    _refused(bytes(token))


@given(_PAYLOADS, st.data())
def test_token_cut_short_or_made_longer_is_refused(payload: bytes, data: st.DataObject) -> None:
    token = TokenSealer(_KEY).seal("page", payload, b"listing")
    _refused(token[: data.draw(st.integers(0, len(token) - 1))])
    _refused(token + data.draw(st.binary(min_size=1, max_size=8)))


@given(st.binary(max_size=100))
def test_made_up_token_is_refused(token: bytes) -> None:
    _refused(token)
    _refused(b"\x01" + token)


def test_token_of_another_key_is_refused() -> None:
    _refused(TokenSealer(_KEY[::-1]).seal("page", b"payload", b"listing"))


def test_token_for_another_use_or_listing_is_refused() -> None:
    sealer = TokenSealer(_KEY)
    _refused(sealer.seal("consistency", b"payload", b"listing"))
    _refused(sealer.seal("page", b"payload", b"other listing"))
    _refused(sealer.seal("page", b"payload"))


@given(st.binary(min_size=1, max_size=12).map(lambda raw: raw.hex()), st.data())
def test_purpose_binding_and_payload_cannot_run_into_each_other(whole: str, data: st.DataObject) -> None:
    """The same letters, cut into three at other places, are another token."""
    cuts = st.tuples(st.integers(0, len(whole)), st.integers(0, len(whole))).map(sorted)
    (i, j), (k, m) = data.draw(cuts), data.draw(cuts)
    assume((i, j) != (k, m))
    sealer = TokenSealer(_KEY)
    token = sealer.seal(whole[:i], whole[j:].encode(), whole[i:j].encode())
    moved = token[: len(token) - len(whole[j:])] + whole[m:].encode()
    with pytest.raises(BadTokenError):
        sealer.open(whole[:k], moved, whole[k:m].encode())


def _refused(token: bytes) -> None:
    with pytest.raises(BadTokenError):
        TokenSealer(_KEY).open("page", token, b"listing")
