"""What callers were told about each memory, and whether what is there agrees with it. Pure.

Each memory has one writer, who does one thing to it after the other. What an answer did not settle he repeats until one
does, with the same ids, or gives up. So of a memory that he has not given up, it is known exactly what it must be:

- acknowledged: it is there once, with what was last acknowledged, at the version that this many changes make;
- deleted: it is not there;
- refused: nobody was asked to store it, and it is not there;
- given up: it may be there, once, with anything that was ever asked for.

What nobody ever asked to be stored must not be there at all.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from memshard import Memory


@dataclass
class Remembered:
    """One memory as its writer knows it."""

    asked: set[str] = field(default_factory=set)
    """Every content that it was ever asked to have."""
    content: str | None = None
    """What it must have now; None: it must not be there. Nothing of the kind is known when it is `open`."""
    version: int = 0
    open: bool = False
    """Something has been asked for, and it is not settled; for good when its writer gave up."""
    changes: int = 0
    """Goes up whenever something is asked for or settled: what was read meanwhile says nothing."""


@dataclass(frozen=True)
class Found:
    """One memory as a reader was given it."""

    id: str
    content: str
    version: int


def found_of(memory: Memory) -> Found:
    """What a reader was given, of a memory of the client's."""
    return Found(memory.id, memory.content, memory.version)


class History:
    """What became of one user's memories."""

    def __init__(self) -> None:
        self.memories: dict[str, Remembered] = {}
        self.wrong: Counter[str] = Counter()
        """What disagreed, and how often it was seen."""
        self.refused_ids: set[str] = set()

    def asks(self, memory_id: str, content: str | None) -> None:
        """Somebody is about to ask for this content; None: to delete it."""
        memory = self.memories.setdefault(memory_id, Remembered())
        if content is not None:
            memory.asked.add(content)
        memory.open = True
        memory.changes += 1

    def settled(self, memory_id: str, content: str | None) -> None:
        """It was acknowledged."""
        memory = self.memories[memory_id]
        memory.content, memory.open = content, False
        memory.version += 1
        memory.changes += 1

    def refused(self, memory_id: str) -> None:
        """A store was turned away before anybody was asked."""
        memory = self.memories[memory_id]
        memory.open = False
        memory.changes += 1
        self.refused_ids.add(memory_id)

    def unchanged(self, memory_id: str) -> None:
        """A change was turned away before anybody was asked."""
        memory = self.memories[memory_id]
        memory.open = False
        memory.changes += 1

    def live(self) -> list[str]:
        """Ids of the memories that must be there."""
        return [memory_id for memory_id, memory in self.memories.items() if not memory.open and memory.content]

    def given_up(self) -> list[str]:
        """Ids of those of which it is not known."""
        return [memory_id for memory_id, memory in self.memories.items() if memory.open]

    def moment(self) -> dict[str, int]:
        """To be taken before a read, and given to `check` with its answer."""
        return {memory_id: memory.changes for memory_id, memory in self.memories.items() if not memory.open}

    def check(self, found: Iterable[Found], *, whole: bool, since: dict[str, int], fresh: bool = True) -> None:
        """Compares an answer with what it must be. `whole`: it is a listing of everything; `fresh`: it is of no older
        state than the moment of `since`.
        """
        seen: Counter[str] = Counter()
        for one in found:
            seen[one.id] += 1
            memory = self.memories.get(one.id)
            if memory is None or one.content not in memory.asked:
                self.wrong["invented"] += 1
            elif fresh and since.get(one.id) == memory.changes:
                self._check_settled(memory, one)
        self.wrong["duplicated"] += sum(count - 1 for count in seen.values())
        if whole and fresh:
            for memory_id, changes in since.items():
                memory = self.memories[memory_id]
                if memory.changes == changes and memory.content is not None and memory_id not in seen:
                    self.wrong["lost"] += 1
        self.wrong = +self.wrong

    def _check_settled(self, memory: Remembered, found: Found) -> None:
        if memory.content is None:
            self.wrong["deleted or refused, and there"] += 1
        elif memory.content != found.content:
            self.wrong["an older content"] += 1
        elif memory.version != found.version:
            self.wrong["a change more or less than acknowledged"] += 1
