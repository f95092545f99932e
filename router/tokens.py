"""The tokens that agents carry: consistency tokens in receipts, page tokens of listings."""

import base64
import binascii
import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from google.protobuf.message import DecodeError

from common.errors import InvalidArgument
from common.level import Level
from common.tokens import BadTokenError, TokenSealer
from memshard.internal.v1 import shard_pb2, tokens_pb2
from memshard.v1 import memory_pb2 as pb
from router.consistency import Position, latest
from router.stamps import Timelines

_CONSISTENCY = "consistency"
_PAGE = "page"
_MAX_CONSISTENCY_TOKENS = 64

# One token that stands for all that came with a read, so that callers need not collect them.
SESSION_TRAILER = "memshard-session-bin"
# The shards that the tokens of a receipt, or of a read, cover, with commas: whoever writes to them later has a token
# that stands for these.
COVERS_TRAILER = "memshard-covers"
# A call's trailers have 8 KiB in all; what is longer is left out, and callers do without.
_MAX_TRAILER_BYTES = 4096

Trailers: TypeAlias = Iterator[tuple[str, str | bytes]]
# Of a write, (shard id, commit) of each part.
Commits: TypeAlias = tuple[tuple[str, shard_pb2.Commit], ...]
Listing: TypeAlias = pb.ListMemoriesRequest | pb.ListMemoryVersionsRequest


@dataclass(frozen=True, slots=True)
class Said:
    """What tokens say: how far the shards' logs were, and the newest topology by which the writes went there."""

    positions: Mapping[str, Position]
    epoch: int


class Tokens:
    """Makes and checks tokens with the cluster's key."""

    def __init__(
        self,
        key: bytes,
        level_of: Callable[[Iterable[str]], Level] = lambda _: Level.NORMAL,
        epoch: Callable[[], int] = lambda: 0,
        timelines: Timelines | None = None,
    ) -> None:
        """`level_of` gives the degradation level of what shards did together, `epoch` that of the topology now;
        `timelines` hear of every commit and every token."""
        self._sealer = TokenSealer(key)
        self._level_of = level_of
        self._epoch = epoch
        self._timelines = timelines or Timelines()

    def receipt(self, *commits: tuple[str, shard_pb2.Commit]) -> pb.WriteReceipt:
        """The receipt of a write to one or several shards: (shard id, commit) of each."""
        positions: dict[str, Position] = {}
        for shard_id, commit in commits:
            self._timelines.observe(shard_id, commit.timeline)
            positions[shard_id] = latest(positions, shard_id, Position(commit.timeline, commit.lsn))
        return pb.WriteReceipt(
            consistency_token=self._token(Said(positions, self._epoch())),
            # Of several, the least: a receipt must not promise more than every part of it keeps.
            durability=min((commit.durability for _, commit in commits), default=pb.DURABILITY_UNSPECIFIED),
            degradation_level=pb.DegradationLevel.ValueType(self._level_of(positions)),
        )

    def said(self, options: pb.ReadOptions) -> "Said":
        """What the tokens say of each shard: the latest of each, whether or not the shard is still there.

        Raises InvalidArgument for a token that is made up, or another cluster's, whatever the level.
        """
        if len(options.consistency_tokens) > _MAX_CONSISTENCY_TOKENS:
            raise InvalidArgument.field(
                "read.consistency_tokens", "OUT_OF_RANGE", f"must be at most {_MAX_CONSISTENCY_TOKENS}"
            )
        positions: dict[str, Position] = {}
        epoch = 0
        for token in options.consistency_tokens:
            said = self._open(token)
            epoch = max(epoch, said.epoch)
            for shard_id, position in said.positions.items():
                self._timelines.observe(shard_id, position.timeline)
                positions[shard_id] = latest(positions, shard_id, position)
        return Said(positions, epoch)

    def read_trailers(self, options: pb.ReadOptions, said: "Said") -> Trailers:
        """What the caller of a read is told of the tokens that came with it."""
        if not options.consistency_tokens:
            return
        yield from _covers(said.positions)
        if len(options.consistency_tokens) > 1 and len(token := self._token(said)) <= _MAX_TRAILER_BYTES:
            yield SESSION_TRAILER, token

    def write_trailers(self, receipt: pb.WriteReceipt) -> Trailers:
        """What the caller of a write is told of the token of its receipt."""
        return _covers(self._open(receipt.consistency_token).positions)

    def _open(self, token: bytes) -> "Said":
        try:
            message = tokens_pb2.ConsistencyToken.FromString(self._sealer.open(_CONSISTENCY, token))
        except BadTokenError:
            raise InvalidArgument.field(
                "read.consistency_tokens", "BAD_CONSISTENCY_TOKEN", "is no token of this cluster"
            ) from None
        positions: dict[str, Position] = {}
        for said in message.positions:
            positions[said.shard_id] = latest(positions, said.shard_id, Position(said.timeline, said.lsn))
        return Said(positions, message.epoch)

    def _token(self, said: "Said") -> bytes:
        message = tokens_pb2.ConsistencyToken(
            positions=[
                shard_pb2.ShardPosition(shard_id=shard_id, timeline=position.timeline, lsn=position.lsn)
                for shard_id, position in sorted(said.positions.items())
            ],
            epoch=said.epoch,
        )
        return self._sealer.seal(_CONSISTENCY, message.SerializeToString())

    def next_page(self, request: Listing, start: tokens_pb2.PageToken) -> str:
        """The token of the page that begins at `start` in the listing that `request` asked for."""
        sealed = self._sealer.seal(_PAGE, start.SerializeToString(), _listing(request))
        return base64.urlsafe_b64encode(sealed).decode()

    def page_start(self, request: Listing) -> tokens_pb2.PageToken:
        """Where the page asked for begins; empty for the first.

        Raises InvalidArgument when the token is made up, or of another listing or cluster.
        """
        if not request.page_token:
            return tokens_pb2.PageToken()
        try:
            token = base64.b64decode(request.page_token.encode(), altchars=b"-_", validate=True)
            return tokens_pb2.PageToken.FromString(self._sealer.open(_PAGE, token, _listing(request)))
        except (binascii.Error, BadTokenError, DecodeError):
            raise InvalidArgument.field(
                "page_token", "BAD_PAGE_TOKEN", "is no token of this listing; begin again with an empty one"
            ) from None


def _covers(positions: Iterable[str]) -> Trailers:
    names = ",".join(sorted(positions))
    if names and len(names) <= _MAX_TRAILER_BYTES:
        yield COVERS_TRAILER, names


def _listing(request: Listing) -> bytes:
    """What makes two requests pages of one listing: everything but the token, the page size and the freshness."""
    same = copy.deepcopy(request)
    for field in ("page_token", "page_size", "read"):
        if field in same.DESCRIPTOR.fields_by_name:
            same.ClearField(field)  # type: ignore[arg-type]  # Which of the two it is, the line above has asked.
    name = same.DESCRIPTOR.full_name.encode()
    return hashlib.sha256(name + b"\0" + same.SerializeToString(deterministic=True)).digest()
