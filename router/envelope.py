"""What is kept in Redis besides places: bytes in an envelope that says whose they are, and that they are whole. Pure.

    kind (2) position (24) shard "\\n" packing (1) MAC (16) payload

The position is in hexadecimal, of one length, so that Redis can compare two of them as text. The MAC is keyed BLAKE2b
of what the payload is for (the cluster's key, the name of the entry) and of everything else in the envelope: what
somebody else put there, what was cut off, and what is another entry's copied here are not taken for an answer. Whatever
is not a whole envelope of ours is nothing.
"""

import hashlib
import hmac
import zlib
from dataclasses import dataclass

from router.consistency import Position

ENTRY = b"M1"
"""An entry."""
MARKER = b"X1"
"""Stands where an entry was to be forgotten: none of an earlier position may be written there."""

HIGHEST = Position(0xFFFF_FFFF, 0xFFFF_FFFF_FFFF_FFFF)
"""Later than any."""

# Below that the work is more than what is saved.
_WORTH_PACKING_BYTES = 512
_LEAST_SAVED_SHARE = 0.1
# The fastest: a memory is some kilobytes of text, and twice the work would save a twentieth of it.
_PACKING_LEVEL = 1
# The largest answer of one memory: 64 KiB of content, 32 KiB of metadata, an embedding.
_MOST_BYTES = 1024 * 1024

_PLAIN, _PACKED = b"\x00", b"\x01"
_POSITION_END = 2 + 24
_MAC_BYTES = 16


@dataclass(frozen=True, slots=True)
class Opened:
    """What was in an envelope."""

    shard_id: str
    position: Position
    payload: bytes


class Envelopes:
    """Makes and opens them, with the cluster's key."""

    def __init__(self, token_key: bytes) -> None:
        self._key = hashlib.blake2b(token_key, digest_size=32, person=b"memshard-caches").digest()

    def digest(self, *parts: str) -> str:
        """What stands for parts in the name of an entry: nobody can tell them from it, or make the same of others."""
        digest = hashlib.blake2b(key=self._key, digest_size=16, person=b"entry name")
        for part in parts:
            encoded = part.encode()
            digest.update(len(encoded).to_bytes(4, "big") + encoded)
        return digest.hexdigest()

    def seal(self, name: str, shard_id: str, position: Position, payload: bytes) -> bytes:
        """An entry for Redis, under this name and no other."""
        head = header(ENTRY, shard_id, position)
        packing = _PLAIN
        if len(payload) >= _WORTH_PACKING_BYTES:
            packed = zlib.compress(payload, _PACKING_LEVEL)
            if len(packed) <= len(payload) * (1 - _LEAST_SAVED_SHARE):
                packing, payload = _PACKED, packed
        return head + packing + self._mac(name, head + packing, payload) + payload

    def open(self, name: str, found: object) -> Opened | None:
        """What is in an entry that was found under a name; None for anything that was not sealed for it."""
        if not isinstance(found, bytes) or not found.startswith(ENTRY):
            return None
        end = found.find(b"\n", _POSITION_END) + 1
        if not end or len(found) < end + 1 + _MAC_BYTES:
            return None
        head, packing = found[:end], found[end : end + 1]
        mac, payload = found[end + 1 : end + 1 + _MAC_BYTES], found[end + 1 + _MAC_BYTES :]
        if not hmac.compare_digest(mac, self._mac(name, head + packing, payload)):
            return None
        # From here on it is what `seal` made.
        position = found[2:_POSITION_END]
        if packing == _PACKED:
            payload = zlib.decompressobj().decompress(payload, _MOST_BYTES)
        return Opened(
            shard_id=head[_POSITION_END:-1].decode(),
            position=Position(int(position[:8], 16), int(position[8:], 16)),
            payload=payload,
        )

    def _mac(self, name: str, head: bytes, payload: bytes) -> bytes:
        mac = hashlib.blake2b(key=self._key, digest_size=_MAC_BYTES, person=b"entry")
        for part in (name.encode(), head, payload):
            mac.update(len(part).to_bytes(4, "big") + part)
        return mac.digest()


def header(kind: bytes, shard_id: str, position: Position) -> bytes:
    """The beginning of an envelope, and the whole of a marker."""
    return kind + b"%08x%016x" % position + shard_id.encode() + b"\n"
