"""What every contender holds and is asked: the same rows and questions, made from a seed in whichever process."""

import os
import time
import uuid
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

K = 10
"""Results of a search."""

# Streams of numbers that must not meet: the rows of a user, what is asked, what is stored.
_ROWS, _ASKED, _STORED = range(3)

Vector = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Workload:
    """How much there is: `users`, each with `memories` of random directions in `dimensions` numbers."""

    users: int
    memories: int
    dimensions: int
    seed: int = 7

    def rows(self, user: int) -> Vector:
        """The embeddings of a user, one in each row, of length 1."""
        return _unit(self._random(_ROWS, user).standard_normal((self.memories, self.dimensions), dtype=np.float32))

    def truth(self, user: int, query: Vector) -> set[str]:
        """The ids of the K memories nearest to `query`, by looking at all of them in double precision."""
        scores = self.rows(user).astype(np.float64) @ query.astype(np.float64)
        return {memory_id(user, int(number)) for number in np.argsort(-scores)[:K]}

    def questions(self, worker: int, round_number: int) -> "Questions":
        """What a worker asks in a round. No two workers and no two rounds ask the same."""
        return Questions(self, self._random(_ASKED, worker, round_number))

    def stored(self, *stream: int) -> np.random.Generator:
        """Where the embeddings of what is stored during a measurement come from."""
        return self._random(_STORED, *stream)

    def _random(self, *stream: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, *stream))


class Questions:
    """Questions without end, every one different: so no cache of results helps anybody."""

    def __init__(self, workload: Workload, random: np.random.Generator) -> None:
        self._workload = workload
        self._random = random

    def search(self) -> tuple[int, Vector]:
        """A user, and what that user's memories are to be near to."""
        query = self._random.standard_normal(self._workload.dimensions, dtype=np.float32)
        return int(self._random.integers(self._workload.users)), _unit(query)

    def get(self) -> tuple[int, str]:
        """A user, and the id of one of the memories."""
        user = int(self._random.integers(self._workload.users))
        return user, memory_id(user, int(self._random.integers(self._workload.memories)))


def user_name(user: int) -> str:
    """The name of a user who has memories from the start."""
    return f"user-{user:05d}"


def memory_id(user: int, number: int) -> str:
    """The id of a user's memory."""
    return str(uuid.UUID(int=(user << 64) | number, version=4))


def new_id() -> str:
    """A UUIDv7 (RFC 9562 §5.7), as agents make them; without memshard, beside which not every contender installs."""
    milliseconds, random = time.time_ns() // 1_000_000, int.from_bytes(os.urandom(10))
    random &= ~(0xF000 << 64 | 0xC000 << 48)
    return str(uuid.UUID(int=milliseconds << 80 | 0x7000 << 64 | 0x8000 << 48 | random))


def content(user: str, number: int) -> str:
    """What is remembered: about a hundred bytes, as a sentence is."""
    return f"{user} said in conversation {number} that tea is better than coffee on mornings like this, and left."


def unit_vector(random: np.random.Generator, dimensions: int) -> Vector:
    """A random direction."""
    return _unit(random.standard_normal(dimensions, dtype=np.float32))


def _unit(vectors: Vector) -> Vector:
    unit: Vector = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
    return unit
