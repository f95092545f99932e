"""With what effort an index finds what an exact search finds.

That depends on the embeddings, and on how many there are: what does for a hundred thousand texts may not do for a
million, and vectors without any structure are found by no effort that is worth it. So it is measured, with questions
made of the memories themselves, against an exact search.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.postgres import Connection
from shard.identity import Identity
from shard.large_users.known import FEW, MANY
from shard.large_users.plan import LargeUser
from shard.rows import to_vector
from shard.schema import USER_KEY

# What is promised is 0.99. The sample may flatter by as much.
_WANTED = 0.995
_QUESTIONS = 100
# pgvector's default, and its most.
_EFFORTS = (40, 70, 100, 150, 220, 320, 470, 680, 1000)
# A question is near a memory, and not too near: as far towards another one. Every second is as near to the other, and
# so to none: what is asked is not always like what was stored, and is harder to find the nearest of.
_ASTRAY = (0.4, 1.0)
# Of a distance: what two ways to add up the same numbers may differ by.
_SAME = 1e-6

# Places are sorted, and not the embeddings themselves.
_SAMPLE = """
SELECT embedding FROM memories
WHERE ctid = ANY (ARRAY(SELECT ctid FROM memories WHERE {whose} ORDER BY random() LIMIT {most}))
"""
# No index has the order of a sum.
_EXACT = """
SELECT embedding <=> {question} AS distance FROM memories WHERE {whose}
ORDER BY (embedding <=> {question}) + 0 LIMIT {most}
"""
_BY_INDEX = "SELECT embedding <=> {question} AS distance FROM {function}({given}{question}, {most}, {effort})"


@dataclass(frozen=True, slots=True)
class Measured:
    """The least effort that will do, for few results and for many; None: there is none."""

    ef_few: int | None
    ef_many: int | None


class _Statements:
    """What is asked about one user's memories, or with None about all; `given` are their first parameters."""

    def __init__(self, user: LargeUser | None) -> None:
        whose = "embedding IS NOT NULL AND deleted_at IS NULL"
        self.given: list[Any] = []
        # Where a user's memories are in one slot, that is how they are found. It comes last.
        self.slots: list[int] = []
        function, first = "shared_index_nearest", ""
        if user is not None:
            whose += f" AND user_id = $1 AND {USER_KEY} = $2"
            self.given = [user.user_id, user.key]
            self.slots = [] if user.slot is None else [user.slot]
            function, first = "own_index_nearest", "$1, $2, "
        one, two, three = (f"${len(self.given) + number}" for number in (1, 2, 3))
        self.sample = _SAMPLE.format(whose=whose + (f" AND slot = {two}" if self.slots else ""), most=one)
        self.exact = _EXACT.format(whose=whose + (f" AND slot = {three}" if self.slots else ""), question=one, most=two)
        self.by_index = _BY_INDEX.format(function=function, given=first, question=one, most=two, effort=three)


async def measure(connection: Connection, identity: Identity, user: LargeUser | None) -> Measured:
    """Of a user's own index, or with None of that of all memories. Some seconds for a hundred thousand: a hundred
    exact searches, and the same by the index.
    """
    statements = _Statements(user)
    sampled = await connection.fetch(statements.sample, *statements.given, 2 * _QUESTIONS, *statements.slots)
    vectors = np.array([row["embedding"].to_numpy() for row in sampled], dtype=np.float32)
    half = len(vectors) // 2
    near, far = _unit(vectors[:half]), _unit(vectors[half : 2 * half])
    astray = np.resize(np.array(_ASTRAY, dtype=np.float32), (half, 1))
    questions = [to_vector(question, identity.precision) for question in _unit(near + astray * far)]

    async def ask(statement: str, *more: int) -> tuple[list[list[float]], float]:
        return await _ask(connection, statement, [(*statements.given, question, *more) for question in questions])

    truths, exact_s = await ask(statements.exact, MANY, *statements.slots)
    found: dict[int, int | None] = {}
    for count in (FEW, MANY):
        found[count] = None
        for ef in (ef for ef in _EFFORTS if ef >= count):
            answers, index_s = await ask(statements.by_index, count, ef)
            if index_s >= exact_s:
                break
            if least_recall(answers, truths, count) >= _WANTED:
                found[count] = ef
                break
    return Measured(found[FEW], found[MANY])


def recall(answers: Sequence[Sequence[float]], truths: Sequence[Sequence[float]], count: int) -> float:
    """Share of the `count` nearest that were found, by their distances: of equals it does not matter which.

    `answers` and `truths` are distances in order, one list for each question.
    """
    pairs = [(answer, truth[:count]) for answer, truth in zip(answers, truths, strict=True) if truth]
    if not pairs:
        return 0.0
    return statistics.fmean(sum(d <= truth[-1] + _SAME for d in answer) / len(truth) for answer, truth in pairs)


def least_recall(answers: Sequence[Sequence[float]], truths: Sequence[Sequence[float]], count: int) -> float:
    """The same of each kind of question by itself, as they come by turns, and the least of them: those that are easy
    must not make up for the others.
    """
    kinds = len(_ASTRAY)
    return min(recall(answers[first::kinds], truths[first::kinds], count) for first in range(kinds))


async def _ask(
    connection: Connection, statement: str, questions: Sequence[Sequence[Any]]
) -> tuple[list[list[float]], float]:
    """The distances of each question's nearest, and the seconds that one takes (the median)."""
    answers, seconds = [], []
    for question in questions:
        began = time.perf_counter()
        rows = await connection.fetch(statement, *question)
        seconds.append(time.perf_counter() - began)
        answers.append([row["distance"] for row in rows])
    return answers, statistics.median(seconds) if seconds else 0.0


def _unit(vectors: Any) -> Any:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.finfo(np.float32).tiny)
