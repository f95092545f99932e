"""Merging the shards' answers to one search, or to one page of a listing. Pure."""

import uuid
from collections.abc import Iterable, Sequence
from itertools import accumulate

from memshard.internal.v1 import shard_pb2
from memshard.v1 import memory_pb2 as pb
from router.validate import Window

# Where a merged page ends early: below the 4 MiB that gRPC clients take by default, as a shard's own pages do.
PAGE_BYTES = 3 * 1024 * 1024


def merge(answers: Iterable[Sequence[pb.ScoredMemory]], window: Window) -> list[pb.ScoredMemory]:
    """The results of `window` among all answers, each of which holds its shard's best `window.k`.

    Best first; ties by id, then user. A memory that two shards report (while its slot moves) counts once.
    """
    best: dict[tuple[str, str], pb.ScoredMemory] = {}
    for results in answers:
        for result in results:
            key = (result.memory.user_id, result.memory.id)
            if key not in best or result.score > best[key].score:
                best[key] = result
    ordered = sorted(best.values(), key=lambda r: (-r.score, r.memory.id, r.memory.user_id))
    return ordered[window.offset : window.k]


def merge_page(
    answers: Sequence[shard_pb2.ListResponse], page_size: int, page_bytes: int = PAGE_BYTES
) -> tuple[list[pb.Memory], shard_pb2.ListPosition | None]:
    """One page of a listing over several shards, newest first, and where the next begins; None when that was all.

    Each answer is its shard's page from the same position on. A shard that has more than it gave has said up to where
    it is complete; nothing older than that may be taken from anybody, or its rows would be skipped.
    """
    floor = max((_position(answer.next) for answer in answers if answer.HasField("next")), default=None)
    memories = {memory.id: memory for answer in answers for memory in answer.memories}
    ordered = sorted(memories.values(), key=_place, reverse=True)
    page = [memory for memory in ordered if floor is None or _place(memory) >= floor][:page_size]
    page = page[: _fitting(page, page_bytes)]
    if floor is None and len(page) == len(ordered):
        return page, None
    create_time_us, memory_id = _place(page[-1]) if page else floor or (0, b"")
    return page, shard_pb2.ListPosition(create_time_us=create_time_us, id=memory_id)


def _fitting(page: Sequence[pb.Memory], page_bytes: int) -> int:
    """How many memories from the start fit into `page_bytes`; at least one, or a listing would never end."""
    totals = accumulate(memory.ByteSize() for memory in page)
    return max(1, sum(1 for total in totals if total <= page_bytes))


def _place(memory: pb.Memory) -> tuple[int, bytes]:
    return memory.create_time.ToMicroseconds(), uuid.UUID(memory.id).bytes


def _position(position: shard_pb2.ListPosition) -> tuple[int, bytes]:
    return position.create_time_us, position.id
