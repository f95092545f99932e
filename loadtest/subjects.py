"""What calls are about: users, memories, texts and embeddings, the same in each process for the same profile."""

import uuid
from collections import deque
from dataclasses import dataclass

import numpy as np

from loadtest.profile import Profile
from memshard import NewMemory
from memshard.ids import new_id

_WORDS = [
    "tea",
    "coffee",
    "garden",
    "train",
    "rain",
    "summer",
    "Berlin",
    "Lisbon",
    "sister",
    "brother",
    "dentist",
    "piano",
    "running",
    "bread",
    "cheese",
    "invoice",
    "meeting",
    "deadline",
    "holiday",
    "birthday",
    "blue",
    "green",
    "quiet",
    "loud",
    "morning",
    "evening",
    "window",
    "bicycle",
    "river",
    "mountain",
    "passport",
    "allergic",
    "prefers",
    "dislikes",
    "remembers",
    "bought",
    "promised",
    "called",
    "visited",
    "cooked",
    "repaired",
    "painted",
    "read",
    "wrote",
    "forgot",
]
# What this process stored and may delete.
_MOST_OWN = 1000


@dataclass(frozen=True, slots=True)
class Key:
    """A memory that is there from the start."""

    user: int
    number: int


class Subjects:
    """Draws what the calls of one process are about."""

    def __init__(self, profile: Profile, process: int) -> None:
        self._profile = profile
        self._data = profile.data
        self._random = np.random.default_rng((profile.seed, 1, process))
        self._count = self._data.users * self._data.memories
        self._own: deque[tuple[str, str]] = deque(maxlen=_MOST_OWN)
        self._cumulative = _zipf(self._count, self._data.zipf) if self._data.zipf else None
        # Of all ranks, so that the most wanted memories are not all one user's; the same in each process.
        self._of_rank = np.random.default_rng((profile.seed, 2)).permutation(self._count) if self._data.zipf else None

    def key(self) -> Key:
        """A memory that is there from the start."""
        if self._cumulative is None or self._of_rank is None:
            number = int(self._random.integers(self._count))
        else:
            rank = int(np.searchsorted(self._cumulative, self._random.random() * self._cumulative[-1], side="right"))
            number = int(self._of_rank[min(rank, self._count - 1)])
        return Key(number // self._data.memories, number % self._data.memories)

    def user(self) -> str:
        """A user, as often as that user's memories are asked for."""
        return self.user_name(self.key().user)

    def user_name(self, user: int) -> str:
        """The name of a user."""
        return f"load-{self._profile.seed}-{user}"

    def id_of(self, key: Key) -> str:
        """The id of a memory that is there from the start."""
        return str(uuid.uuid5(uuid.NAMESPACE_OID, f"{self._profile.seed} {key.user} {key.number}"))

    def original(self, key: Key) -> NewMemory:
        """That memory, made anew in the same way."""
        random = np.random.default_rng((self._profile.seed, 3, key.user, key.number))
        return NewMemory(
            user_id=self.user_name(key.user),
            id=self.id_of(key),
            content=_text(random, self._data.content_bytes),
            embedding=_embedding(random, self._data.dimensions),
        )

    def fresh(self) -> NewMemory:
        """A new memory of some user."""
        memory = NewMemory(user_id=self.user(), id=new_id(), content=self.content(), embedding=self.embedding())
        self._own.append((memory.user_id, memory.id))
        return memory

    def content(self) -> str:
        """A new text."""
        return _text(self._random, self._data.content_bytes)

    def query(self) -> str:
        """A few words; empty where callers bring embeddings."""
        return " ".join(self._random.choice(_WORDS, 4)) if self._data.dimensions is None else ""

    def words(self) -> str:
        """Words to search for."""
        return " ".join(self._random.choice(_WORDS, 2))

    def embedding(self) -> list[float] | None:
        """What a search or a new text comes with."""
        return _embedding(self._random, self._data.dimensions)

    def doomed(self) -> tuple[str, str]:
        """User and id of a memory that this process has stored, and does not name again; or of none."""
        return self._own.popleft() if self._own else (self.user(), new_id())

    def throwaway_user(self) -> str:
        """A user whom nobody else asks about."""
        return f"load-{self._profile.seed}-erased-{new_id()}"


def _text(random: np.random.Generator, size: int) -> str:
    words = random.choice(_WORDS, size // 4 + 1)
    return " ".join(words)[:size].strip().ljust(size, ".")


def _embedding(random: np.random.Generator, dimensions: int | None) -> list[float] | None:
    if dimensions is None:
        return None
    vector = random.standard_normal(dimensions)
    listed: list[float] = (vector / np.linalg.norm(vector)).tolist()
    return listed


def _zipf(count: int, exponent: float) -> "np.typing.NDArray[np.float64]":
    """The weights of ranks up to each, added up."""
    return np.cumsum(np.arange(1, count + 1, dtype=np.float64) ** -exponent)
