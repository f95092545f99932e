"""The digest of a store: equal for the same request sent again, and for nothing else.

SHA-256 over the caller's request in normal form, with the embedding as it was sent: before rounding, and absent when
the cluster makes it. Protobuf's own serialisation is not canonical (a map has no order), so fields are hashed here.
"""

import hashlib
import json

import numpy as np
from google.protobuf import json_format, struct_pb2

from memshard.v1 import memory_pb2 as pb

# Raised when the form below changes; rows keep the digests they were stored with.
_FORM = b"memshard store 1"


def digest_of(memory: pb.Memory) -> bytes:
    """32 bytes that identify a validated memory: every field that the caller sets."""
    expire_time = memory.expire_time
    parts = (
        _FORM,
        memory.user_id.encode(),
        memory.id.encode(),
        memory.agent_id.encode(),
        memory.session_id.encode(),
        str(memory.type).encode(),
        memory.content.encode(),
        _canonical(memory.metadata),
        np.float32(memory.importance).tobytes(),
        np.array(memory.embedding, dtype="<f4").tobytes(),
        memory.embedding_model.encode(),
        f"{expire_time.seconds}.{expire_time.nanos}".encode() if memory.HasField("expire_time") else b"",
    )
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.digest()


def _canonical(metadata: struct_pb2.Struct) -> bytes:
    """As JSON, with the keys in order."""
    if not metadata.fields:
        return b"{}"  # What json makes of it, without making it.
    return json.dumps(json_format.MessageToDict(metadata), sort_keys=True).encode()
