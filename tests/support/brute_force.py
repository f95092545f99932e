"""What a search must find: every stored embedding compared with the query, and no index and no shard involved."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

# Half precision in, single precision out: scores agree to about this much.
ROUNDING = 1e-4


class BruteForce:
    """Memory id → (user, embedding), rounded as it is stored."""

    def __init__(self, stored: Mapping[str, tuple[str, Sequence[float]]]) -> None:
        self._ids = np.array(list(stored))
        self._users = np.array([user for user, _ in stored.values()])
        rows = np.array([embedding for _, embedding in stored.values()], dtype=np.float16).astype(np.float64)
        self._rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)

    def ranking(self, query: Sequence[float], user: str | None = None) -> list[tuple[str, float]]:
        """(id, cosine similarity) of all memories, or of a user's, best first."""
        asked = np.array(query, dtype=np.float16).astype(np.float64)
        theirs = slice(None) if user is None else self._users == user
        scores = self._rows[theirs] @ asked / np.linalg.norm(asked)
        return sorted(zip(self._ids[theirs].tolist(), scores.tolist(), strict=True), key=lambda one: (-one[1], one[0]))


def assert_same(results: Sequence[Any], ranking: list[tuple[str, float]], limit: int, offset: int = 0) -> None:
    """`results`, scored memories, are `ranking[offset : offset + limit]`, but for the order of scores that
    only rounding tells apart.
    """
    true_score = dict(ranking)
    expected = [score for _, score in ranking[offset : offset + limit]]
    assert [r.score for r in results] == pytest.approx(expected, abs=ROUNDING)
    assert [r.score for r in results] == pytest.approx([true_score[r.memory.id] for r in results], abs=ROUNDING)
    assert len({r.memory.id for r in results}) == len(results)
    assert list(results) == sorted(results, key=lambda r: (-r.score, r.memory.id))
