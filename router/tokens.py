"""The tokens that agents carry: consistency tokens in receipts, page tokens of listings."""

import base64
import binascii
import hashlib

from google.protobuf.message import DecodeError

from common.errors import InvalidArgument
from common.tokens import BadTokenError, TokenSealer
from memshard.internal.v1 import shard_pb2, tokens_pb2
from memshard.v1 import memory_pb2 as pb

_CONSISTENCY = "consistency"
_PAGE = "page"
_MAX_CONSISTENCY_TOKENS = 64


class Tokens:
    """Makes and checks tokens with the cluster's key."""

    def __init__(self, key: bytes) -> None:
        self._sealer = TokenSealer(key)

    def receipt(self, shard_id: str, commit: shard_pb2.Commit) -> pb.WriteReceipt:
        """The receipt of a write to one shard."""
        position = tokens_pb2.ShardPosition(shard_id=shard_id, timeline=commit.timeline, lsn=commit.lsn)
        payload = tokens_pb2.ConsistencyToken(positions=[position]).SerializeToString()
        return pb.WriteReceipt(
            consistency_token=self._sealer.seal(_CONSISTENCY, payload),
            durability=commit.durability,
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

    def next_page(self, request: pb.ListMemoriesRequest, after: shard_pb2.ListPosition) -> str:
        """The token of the page that follows `after` in the listing that `request` asked for."""
        payload = tokens_pb2.PageToken(after=after).SerializeToString()
        return base64.urlsafe_b64encode(self._sealer.seal(_PAGE, payload, _listing(request))).decode()

    def page_start(self, request: pb.ListMemoriesRequest) -> shard_pb2.ListPosition | None:
        """Where the page asked for begins; None for the first.

        Raises InvalidArgument when the token is made up, or of another listing or cluster.
        """
        if not request.page_token:
            return None
        try:
            token = base64.b64decode(request.page_token.encode(), altchars=b"-_", validate=True)
            payload = self._sealer.open(_PAGE, token, _listing(request))
            return tokens_pb2.PageToken.FromString(payload).after
        except (binascii.Error, BadTokenError, DecodeError):
            raise InvalidArgument.field(
                "page_token", "BAD_PAGE_TOKEN", "is no token of this listing; begin again with an empty one"
            ) from None


def _listing(request: pb.ListMemoriesRequest) -> bytes:
    """What makes two requests pages of one listing: everything but the token, the page size and the freshness."""
    same = pb.ListMemoriesRequest()
    same.CopyFrom(request)
    for field in ("page_token", "page_size", "read"):
        same.ClearField(field)
    return hashlib.sha256(same.SerializeToString(deterministic=True)).digest()
