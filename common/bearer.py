"""The token that calls of a service for operators have to bring, as `authorization: Bearer TOKEN`."""

import hmac
from typing import TYPE_CHECKING, Any

from common.errors import Unauthenticated

if TYPE_CHECKING:
    import grpc

_HEADER = "authorization"


class Bearer:
    """Lets calls pass that bring the token."""

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}".encode()

    def require(self, context: "grpc.aio.ServicerContext[Any, Any]") -> None:
        """Raises Unauthenticated. Takes as long whatever is wrong with what was given."""
        given = dict(context.invocation_metadata() or ()).get(_HEADER, "")
        if not hmac.compare_digest(str(given).encode(), self._expected):
            raise Unauthenticated("this needs the token that is kept for operators, in the cluster's data directory")


def credentials(token: str) -> tuple[tuple[str, str], ...]:
    """The metadata of a call that brings it."""
    return ((_HEADER, f"Bearer {token}"),)
