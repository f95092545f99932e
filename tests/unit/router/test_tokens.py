"""Tokens that agents carry: good for what they were given for, and for nothing else."""

import base64

import pytest
from google.protobuf import struct_pb2
from hypothesis import given
from hypothesis import strategies as st

from common.errors import InvalidArgument
from common.tokens import TokenSealer
from memshard.internal.v1 import shard_pb2, tokens_pb2
from memshard.v1 import memory_pb2 as pb
from router.tokens import Tokens
from tests.unit.router.memories import struct

_KEY = b"k" * 32
_TOKENS, _OTHER_CLUSTER = Tokens(_KEY), Tokens(b"o" * 32)
_POSITION = tokens_pb2.PageToken(after=shard_pb2.ListPosition(create_time_us=1_700_000_000_123_456, id=b"i" * 16))
# Enough names for protobuf to write them in the order they came, unless it is told not to.
_MAP = {str(i): i for i in range(50)}

_positions = st.builds(
    shard_pb2.ListPosition,
    create_time_us=st.integers(-(2**63), 2**63 - 1),
    id=st.binary(min_size=16, max_size=16),
).map(lambda position: tokens_pb2.PageToken(after=position))


def _listing(**changes: object) -> pb.ListMemoriesRequest:
    fields: dict[str, object] = {
        "user_id": "user-1",
        "include_embedding": False,
        "filter": pb.Filter(
            comparison=pb.Comparison(
                field="metadata.a",
                operator=pb.OPERATOR_EQ,
                value=struct_pb2.Value(struct_value=struct(_MAP)),
            )
        ),
        **changes,
    }
    return pb.ListMemoriesRequest(**fields)  # type: ignore[arg-type]  # One dictionary for fields of several types.


def _refused(tokens: Tokens, request: pb.ListMemoriesRequest) -> None:
    with pytest.raises(InvalidArgument) as caught:
        tokens.page_start(request)
    assert caught.value.reason == "BAD_PAGE_TOKEN"
    assert [violation.field for violation in caught.value.violations] == ["page_token"]


@given(_positions)
def test_next_page_begins_where_its_token_says(position: tokens_pb2.PageToken) -> None:
    token = _TOKENS.next_page(_listing(), position)
    assert _TOKENS.page_start(_listing(page_token=token)) == position


def test_first_page_has_no_token() -> None:
    assert _TOKENS.page_start(_listing()) == tokens_pb2.PageToken()


def test_page_size_and_freshness_may_change_from_page_to_page() -> None:
    token = _TOKENS.next_page(_listing(page_size=10), _POSITION)
    later = _listing(page_token=token, page_size=20, read=pb.ReadOptions(level=pb.READ_LEVEL_EVENTUAL))
    assert _TOKENS.page_start(later) == _POSITION
    # The token of the next page is made from a request that carries that of the last one.
    assert _TOKENS.page_start(_listing(page_token=_TOKENS.next_page(later, _POSITION))) == _POSITION


@pytest.mark.parametrize(
    "changes",
    [
        {"user_id": "user-2"},
        {"user_id": "USER-1"},
        {"include_embedding": True},
        {"filter": None},
        {"filter": pb.Filter(negation=pb.Filter())},
    ],
)
def test_token_of_another_listing_is_refused(changes: dict[str, object]) -> None:
    token = _TOKENS.next_page(_listing(), _POSITION)
    _refused(_TOKENS, _listing(page_token=token, **changes))


def test_order_of_a_filters_map_does_not_make_another_listing() -> None:
    turned = _listing()
    turned.filter.comparison.value.struct_value.CopyFrom(struct(dict(reversed(_MAP.items()))))
    turned.page_token = _TOKENS.next_page(_listing(), _POSITION)
    assert _TOKENS.page_start(turned) == _POSITION


def test_token_of_another_cluster_is_refused() -> None:
    _refused(_OTHER_CLUSTER, _listing(page_token=_TOKENS.next_page(_listing(), _POSITION)))


@given(st.text(max_size=80) | st.binary(max_size=80).map(lambda raw: base64.urlsafe_b64encode(raw).decode()))
def test_made_up_page_token_is_refused(token: str) -> None:
    if token:
        _refused(_TOKENS, _listing(page_token=token))


@given(st.data())
def test_page_token_with_a_character_changed_is_refused_or_the_same(data: st.DataObject) -> None:
    """Base64 has bits to spare at its end: a change there is none. Any other must not move the page."""
    token = _TOKENS.next_page(_listing(), _POSITION)
    at = data.draw(st.integers(0, len(token) - 1))
    changed = token[:at] + data.draw(st.characters(codec="utf-8")) + token[at + 1 :]
    try:
        start = _TOKENS.page_start(_listing(page_token=changed))
    except InvalidArgument as refusal:
        assert refusal.reason == "BAD_PAGE_TOKEN"  # noqa: PT017  # Either is right.
    else:
        assert start == _POSITION


def test_consistency_token_says_where_the_write_is() -> None:
    commit = shard_pb2.Commit(timeline=3, lsn=2**63 + 5, durability=pb.DURABILITY_QUORUM)
    receipt = _TOKENS.receipt(("shard-1", commit))
    assert receipt.durability == pb.DURABILITY_QUORUM
    payload = TokenSealer(_KEY).open("consistency", receipt.consistency_token)
    (position,) = tokens_pb2.ConsistencyToken.FromString(payload).positions
    assert position == shard_pb2.ShardPosition(shard_id="shard-1", timeline=3, lsn=2**63 + 5)


def _session(*tokens: bytes) -> pb.ReadOptions:
    return pb.ReadOptions(level=pb.READ_LEVEL_SESSION, consistency_tokens=tokens)


_commits = st.lists(
    st.tuples(
        st.sampled_from(["shard-0", "shard-1", "gone"]),
        st.builds(shard_pb2.Commit, timeline=st.integers(1, 3), lsn=st.integers(0, 2**64 - 1)),
    ),
    max_size=4,
)


@given(st.lists(_commits, max_size=8))
def test_of_each_shard_the_latest_timeline_and_then_the_latest_position_counts(
    writes: list[list[tuple[str, shard_pb2.Commit]]],
) -> None:
    options = _session(*(_TOKENS.receipt(*commits).consistency_token for commits in writes))
    expected: dict[str, tuple[int, int]] = {}
    for shard_id, commit in (commit for commits in writes for commit in commits):
        expected[shard_id] = max(expected.get(shard_id, (0, 0)), (commit.timeline, commit.lsn))
    said = _TOKENS.said(options)
    assert said.positions == expected
    # One token stands for all of them, and is offered where there is more than one.
    trailers = dict(_TOKENS.read_trailers(options, said))
    assert trailers.pop("memshard-covers", "") == ",".join(sorted(expected))
    assert (list(trailers) == ["memshard-session-bin"]) == (len(writes) > 1)
    for token in trailers.values():
        assert isinstance(token, bytes)
        assert _TOKENS.said(_session(token)).positions == expected


def test_receipt_says_which_shards_it_covers() -> None:
    commit = shard_pb2.Commit(timeline=1, lsn=1)
    receipt = _TOKENS.receipt(("shard-1", commit), ("shard-0", commit), ("shard-1", commit))
    assert list(_TOKENS.write_trailers(receipt)) == [("memshard-covers", "shard-0,shard-1")]


def test_what_does_not_fit_into_a_trailer_is_left_out() -> None:
    commit = shard_pb2.Commit(timeline=1, lsn=1)
    receipt = _TOKENS.receipt(*((f"{number:060}", commit) for number in range(100)))
    options = _session(receipt.consistency_token, receipt.consistency_token)
    assert list(_TOKENS.write_trailers(receipt)) == []
    assert list(_TOKENS.read_trailers(options, _TOKENS.said(options))) == []


def test_consistency_tokens_of_this_cluster_are_taken() -> None:
    token = _TOKENS.receipt(("shard-1", shard_pb2.Commit(timeline=1, lsn=1))).consistency_token
    _TOKENS.said(pb.ReadOptions())
    _TOKENS.said(pb.ReadOptions(consistency_tokens=[token] * 64))


@pytest.mark.parametrize(
    ("tokens", "reason"),
    [
        pytest.param([b""], "BAD_CONSISTENCY_TOKEN", id="empty"),
        pytest.param([b"made up"], "BAD_CONSISTENCY_TOKEN", id="made up"),
        pytest.param(
            [_OTHER_CLUSTER.receipt(("shard-1", shard_pb2.Commit())).consistency_token],
            "BAD_CONSISTENCY_TOKEN",
            id="another cluster's",
        ),
        pytest.param(
            [base64.urlsafe_b64decode(_TOKENS.next_page(_listing(), _POSITION))],
            "BAD_CONSISTENCY_TOKEN",
            id="a page's",
        ),
        pytest.param(
            [_TOKENS.receipt(("shard-1", shard_pb2.Commit())).consistency_token, b"made up"],
            "BAD_CONSISTENCY_TOKEN",
            id="one of two",
        ),
        pytest.param([b""] * 65, "OUT_OF_RANGE", id="too many"),
    ],
)
@pytest.mark.parametrize("level", pb.ReadLevel.values())
def test_other_consistency_tokens_are_refused_at_every_level(
    level: pb.ReadLevel.ValueType, tokens: list[bytes], reason: str
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        _TOKENS.said(pb.ReadOptions(level=level, consistency_tokens=tokens))
    assert caught.value.reason == reason
    assert [violation.field for violation in caught.value.violations] == ["read.consistency_tokens"]


def test_the_newest_topology_that_was_written_by_goes_with_the_tokens() -> None:
    commit = shard_pb2.Commit(timeline=1, lsn=1)
    older = Tokens(_KEY, epoch=lambda: 3).receipt(("a", commit))
    newer = Tokens(_KEY, epoch=lambda: 8).receipt(("a", commit))
    both = pb.ReadOptions(consistency_tokens=[newer.consistency_token, older.consistency_token])
    assert _TOKENS.said(both).epoch == 8
