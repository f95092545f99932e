"""The tokens that agents carry: consistency tokens in receipts, page tokens of listings."""

import base64
import binascii
import copy
import hashlib
from typing import TypeAlias

from google.protobuf.message import DecodeError

from common.errors import InvalidArgument
from common.tokens import BadTokenError, TokenSealer
from memshard.internal.v1 import shard_pb2, tokens_pb2
from memshard.v1 import memory_pb2 as pb

_CONSISTENCY = "consistency"
_PAGE = "page"
_MAX_CONSISTENCY_TOKENS = 64

Listing: TypeAlias = pb.ListMemoriesRequest | pb.ListMemoryVersionsRequest


class Tokens:
    """Makes and checks tokens with the cluster's key."""

    def __init__(self, key: bytes) -> None:
        self._sealer = TokenSealer(key)

    def receipt(self, *commits: tuple[str, shard_pb2.Commit]) -> pb.WriteReceipt:
        """The receipt of a write to one or several shards: (shard id, commit) of each."""
        positions = [
            shard_pb2.ShardPosition(shard_id=shard_id, timeline=commit.timeline, lsn=commit.lsn)
            for shard_id, commit in commits
        ]
        payload = tokens_pb2.ConsistencyToken(positions=positions).SerializeToString()
        return pb.WriteReceipt(
            consistency_token=self._sealer.seal(_CONSISTENCY, payload),
            # Of several, the least: a receipt must not promise more than every part of it keeps.
            durability=min((commit.durability for _, commit in commits), default=pb.DURABILITY_UNSPECIFIED),
            degradation_level=pb.DEGRADATION_LEVEL_NORMAL,
        )

    def check_consistency(self, options: pb.ReadOptions) -> None:
        """Raises InvalidArgument for a token that is made up, or another cluster's."""
        if len(options.consistency_tokens) > _MAX_CONSISTENCY_TOKENS:
            raise InvalidArgument.field(
                "read.consistency_tokens", "OUT_OF_RANGE", f"must be at most {_MAX_CONSISTENCY_TOKENS}"
            )
        for token in options.consistency_tokens:
            try:
                self._sealer.open(_CONSISTENCY, token)
            except BadTokenError:
                raise InvalidArgument.field(
                    "read.consistency_tokens", "BAD_CONSISTENCY_TOKEN", "is no token of this cluster"
                ) from None

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


def _listing(request: Listing) -> bytes:
    """What makes two requests pages of one listing: everything but the token, the page size and the freshness."""
    same = copy.deepcopy(request)
    for field in ("page_token", "page_size", "read"):
        if field in same.DESCRIPTOR.fields_by_name:
            same.ClearField(field)  # type: ignore[arg-type]  # Which of the two it is, the line above has asked.
    name = same.DESCRIPTOR.full_name.encode()
    return hashlib.sha256(name + b"\0" + same.SerializeToString(deterministic=True)).digest()
