"""Merging the shards' answers to one search. Pure."""

from collections.abc import Iterable, Sequence

from memshard.v1 import memory_pb2 as pb
from router.validate import Window


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
