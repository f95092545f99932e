"""What became of calls, counted in one process and added up over all of them."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from loadtest.histogram import Histogram

OK = "OK"
_NORMAL = "NORMAL"


class Said(NamedTuple):
    """What an answer says of itself, as far as it does."""

    level: str = ""
    """The degradation level in force: NORMAL. Empty where there is no place for it."""
    cached: bool | None = None
    """Of a read, whether caches alone gave the answer. None: it is no read."""


_NOTHING = Said()


@dataclass(slots=True)
class Outcomes:
    """The calls of one operation. Latencies are those of the successful ones, as ghz has it."""

    latency: Histogram = field(default_factory=Histogram)
    codes: Counter[str] = field(default_factory=Counter)
    """gRPC status codes, OK among them."""
    errors: Counter[str] = field(default_factory=Counter)
    """Failed calls by code and the service's reason for it."""
    levels: Counter[str] = field(default_factory=Counter)
    """Answers by the degradation level that they came under; those at NORMAL are not among them."""
    reads: int = 0
    """Answers that say who gave them."""
    cached: int = 0
    """Those of them that came from caches alone."""

    @property
    def count(self) -> int:
        """All calls."""
        return self.codes.total()

    @property
    def cache_hit_ratio(self) -> float | None:
        """The share of reads that caches answered; None without any read."""
        return self.cached / self.reads if self.reads else None

    def succeeded(self, seconds: float, said: Said = _NOTHING) -> None:
        """One more, that long after it was due."""
        self.latency.record(seconds)
        self.codes[OK] += 1
        if said.level not in ("", _NORMAL):
            self.levels[said.level] += 1
        if said.cached is not None:
            self.reads += 1
            self.cached += said.cached

    def failed(self, code: str, reason: str) -> None:
        """One more that failed."""
        self.codes[code] += 1
        self.errors[f"{code} {reason}".strip()] += 1

    def merge(self, other: "Outcomes") -> None:
        """Adds another's calls."""
        self.latency.merge(other.latency)
        self.codes.update(other.codes)
        self.errors.update(other.errors)
        self.levels.update(other.levels)
        self.reads += other.reads
        self.cached += other.cached

    def to_json(self) -> dict[str, Any]:
        return {
            "latency": self.latency.to_json(),
            "codes": dict(self.codes),
            "errors": dict(self.errors),
            "levels": dict(self.levels),
            "reads": self.reads,
            "cached": self.cached,
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "Outcomes":
        """What `to_json` gave."""
        return cls(
            Histogram.from_json(document["latency"]),
            Counter(document["codes"]),
            Counter(document["errors"]),
            Counter(document["levels"]),
            document["reads"],
            document["cached"],
        )


@dataclass(slots=True)
class Tally:
    """All calls of a run, by operation."""

    operations: dict[str, Outcomes] = field(default_factory=dict)
    seconds: float = 0.0
    """How long was measured; of several processes the longest."""
    late_s: float = 0.0
    """How much later than due a call was ever begun by a process that had a caller free: its own slowness."""
    cut_off: int = 0
    """Calls that had no answer when the run was over and their time too."""

    def of(self, operation: str) -> Outcomes:
        """Those of one operation."""
        return self.operations.setdefault(operation, Outcomes())

    def all(self) -> Outcomes:
        """All operations together."""
        whole = Outcomes()
        for outcomes in self.operations.values():
            whole.merge(outcomes)
        return whole

    def to_json(self) -> dict[str, Any]:
        return {
            "operations": {name: outcomes.to_json() for name, outcomes in self.operations.items()},
            "seconds": self.seconds,
            "late_s": self.late_s,
            "cut_off": self.cut_off,
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "Tally":
        """What `to_json` gave."""
        operations = {name: Outcomes.from_json(one) for name, one in document["operations"].items()}
        return cls(operations, document["seconds"], document["late_s"], document["cut_off"])


def merged(tallies: Iterable[Tally]) -> Tally:
    """Those of several processes, that ran at the same time, in one."""
    whole = Tally()
    for tally in tallies:
        for name, outcomes in tally.operations.items():
            whole.of(name).merge(outcomes)
        whole.seconds = max(whole.seconds, tally.seconds)
        whole.late_s = max(whole.late_s, tally.late_s)
        whole.cut_off += tally.cut_off
    return whole
