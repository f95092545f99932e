"""Opaque tokens that agents carry for us: signed with the cluster's key, so that made-up ones are refused.

A token is version (1 byte), MAC (16 bytes), payload. The MAC is HMAC-SHA256 over what the token is for, what it is
bound to, and the payload, cut to 128 bits (RFC 2104 §5 allows half of the hash).
"""

import hashlib
import hmac

_VERSION = b"\x01"
_MAC_BYTES = 16


class BadTokenError(ValueError):
    """The token was not made by this cluster, for this purpose and binding."""


class TokenSealer:
    """Seals and opens tokens with one key."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def seal(self, purpose: str, payload: bytes, bound_to: bytes = b"") -> bytes:
        """A token of `payload`, good only for the same `purpose` and `bound_to`."""
        return _VERSION + self._mac(purpose, payload, bound_to) + payload

    def open(self, purpose: str, token: bytes, bound_to: bytes = b"") -> bytes:
        """The payload of a token. Raises BadTokenError."""
        head = len(_VERSION) + _MAC_BYTES
        version, mac, payload = token[:1], token[1:head], token[head:]
        if version != _VERSION or not hmac.compare_digest(mac, self._mac(purpose, payload, bound_to)):
            raise BadTokenError("not a token of this cluster for this use")
        return payload

    def _mac(self, purpose: str, payload: bytes, bound_to: bytes) -> bytes:
        mac = hmac.new(self._key, digestmod=hashlib.sha256)
        for part in (_VERSION, purpose.encode(), bound_to, payload):
            # Lengths keep the parts apart: no two different triples sign the same bytes.
            mac.update(len(part).to_bytes(8, "big") + part)
        return mac.digest()[:_MAC_BYTES]
