"""What the rounds of a benchmark come to: medians, ratios, a table. Pure."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from loadtest.histogram import Histogram, merged

SECTIONS = ("search", "store", "get", "get-hot", "bulk")
_TITLES = {
    "search": "search one user",
    "store": "store one",
    "get": "get by id, uncached",
    "get-hot": "get by id, the same few",
    "bulk": "bulk load",
}
BASE = "asyncpg, vector"


@dataclass(frozen=True, slots=True)
class Target:
    """A ratio that has to be reached: `memshard` divided by `divisor` in a section."""

    section: str
    divisor: str
    must: float
    aim: float | None = None


TARGETS = (
    Target("search", "asyncpg, vector", 1.3, 2.0),
    Target("search", "asyncpg, vector PLAIN", 0.55, 1.0),
    Target("search", "Chroma server", 10, 20),
    Target("store", "asyncpg, vector", 0.3, 0.5),
    Target("get", "asyncpg, vector", 0.1),
    Target("get-hot", "asyncpg, vector", 0.3),
    Target("bulk", "COPY into the shard's table", 0.25, 0.6),
)


@dataclass(slots=True)
class Round:
    """What one contender did in one round of one section: the sum over its workers."""

    rate: float
    histogram: Histogram
    recalls: list[float] = field(default_factory=list)
    errors: dict[str, int] = field(default_factory=dict)
    levels: dict[str, int] = field(default_factory=dict)
    generator_cpu: float = 0.0
    """Cores that the workers themselves kept busy."""


def of_workers(done: Sequence[Mapping[str, Any]]) -> Round:
    """The sum of what the workers of one contender say that they did at the same time."""
    errors: dict[str, int] = {}
    levels: dict[str, int] = {}
    for one in done:
        for name, count in one["errors"].items():
            errors[name] = errors.get(name, 0) + count
        for name, count in one["levels"].items():
            levels[name] = levels.get(name, 0) + count
    return Round(
        rate=sum(one["count"] / one["seconds"] for one in done if one["seconds"]),
        histogram=merged(Histogram.from_json(one["histogram"]) for one in done),
        recalls=[recall for one in done for recall in one["recalls"]],
        errors=errors,
        levels=levels,
        generator_cpu=sum(one["cpu_s"] / one["seconds"] for one in done if one["seconds"]),
    )


@dataclass(slots=True)
class Results:
    """Rounds by section and contender."""

    rounds: dict[str, dict[str, list[Round]]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def add(self, section: str, name: str, done: Round) -> None:
        """One more round."""
        self.rounds.setdefault(section, {}).setdefault(name, []).append(done)

    def rate(self, section: str, name: str) -> float | None:
        """Median of the rounds; None for who was not measured."""
        rounds = self.rounds.get(section, {}).get(name)
        return median(one.rate for one in rounds) if rounds else None

    def ratio(self, section: str, divisor: str, dividend: str = "memshard") -> float | None:
        """Median of the ratios of the rounds, each taken within its round, where the machine was the same for both."""
        ours, theirs = (self.rounds.get(section, {}).get(name, []) for name in (dividend, divisor))
        ratios = [one.rate / other.rate for one, other in zip(ours, theirs, strict=False) if other.rate]
        return median(ratios) if ratios else None

    def recall(self, section: str, name: str) -> float | None:
        """Mean over all searches that were examined."""
        recalls = [recall for one in self.rounds[section][name] for recall in one.recalls]
        return sum(recalls) / len(recalls) if recalls else None

    def faults(self) -> list[str]:
        """Why this is no measurement: errors, or a degradation level, in what memshard was asked for."""
        found = []
        for section, by_name in self.rounds.items():
            for name, rounds in by_name.items():
                errors = _summed(one.errors for one in rounds)
                levels = _summed(one.levels for one in rounds)
                if errors:
                    found.append(f"{section}, {name}: {_counted(errors)}")
                if levels:
                    found.append(f"{section}, {name}: answers under a degradation level: {_counted(levels)}")
        return found

    def missed(self) -> list[str]:
        """The targets that were measured and not reached."""
        return [
            f"{target.section} ÷ {target.divisor}: {ratio:.2f}, must be {target.must:g}"
            for target in TARGETS
            if (ratio := self.ratio(target.section, target.divisor)) is not None and ratio < target.must
        ]

    def tables(self) -> str:
        """Markdown: a table for each section, and the targets."""
        parts = [self.section_text(section) for section in SECTIONS if section in self.rounds]
        if self.left_out:
            parts.append("\n".join(f"{name}: left out, {why}." for name, why in self.left_out.items()))
        return "\n\n".join(parts)

    def section_text(self, section: str) -> str:
        """One section's table and targets, in Markdown."""
        rows = [row for target in TARGETS if target.section == section and (row := self._target(target))]
        head = ["", "| memshard ÷ | measured | must | aim |", "|---|---|---|---|"] if rows else []
        return "\n".join([self._section(section), *head, *rows])

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "sections": {
                section: {
                    name: {
                        "rate": self.rate(section, name),
                        "rates": [one.rate for one in rounds],
                        "recall": self.recall(section, name),
                        "p50_ms": 1000 * merged(one.histogram for one in rounds).percentile(0.5),
                        "p99_ms": 1000 * merged(one.histogram for one in rounds).percentile(0.99),
                        "generator_cores": median(one.generator_cpu for one in rounds),
                        "ratio_to_base": self.ratio(section, BASE, name),
                    }
                    for name, rounds in by_name.items()
                }
                for section, by_name in self.rounds.items()
            },
            "targets": [
                {"section": t.section, "divisor": t.divisor, "must": t.must, "ratio": self.ratio(t.section, t.divisor)}
                for t in TARGETS
            ],
            "left_out": self.left_out,
            "faults": self.faults(),
        }

    def _section(self, section: str) -> str:
        unit = "rows/s" if section == "bulk" else "calls/s"
        lines = [
            f"### {_TITLES[section]}\n",
            f"| | {unit} (rounds) | ÷ {BASE} | recall | p50 ms | p99 ms | cores of the callers |",
            "|---|---|---|---|---|---|---|",
        ]
        for name, rounds in self.rounds[section].items():
            rate = self.rate(section, name) or 0.0
            ratio = self.ratio(section, BASE, name)
            recall = self.recall(section, name)
            latency = merged(one.histogram for one in rounds)
            spread = f" ({min(one.rate for one in rounds):,.0f} to {max(one.rate for one in rounds):,.0f})"
            times = [f"{1000 * latency.percentile(share):.1f}" if latency.count else "" for share in (0.5, 0.99)]
            lines.append(
                f"| {name} | {rate:,.0f}{spread} | {'' if ratio is None else f'{ratio:.2f}'} "
                f"| {'' if recall is None else f'{recall:.3f}'} | {times[0]} | {times[1]} "
                f"| {median(one.generator_cpu for one in rounds):.2f} |"
            )
        return "\n".join(lines)

    def _target(self, target: Target) -> str:
        ratio = self.ratio(target.section, target.divisor)
        if ratio is None:
            return ""
        mark = "**missed** " if ratio < target.must else ""
        aim = "" if target.aim is None else f"{target.aim:g}"
        return f"| {_TITLES[target.section]} ÷ {target.divisor} | {mark}{ratio:.2f} | ≥ {target.must:g} | {aim} |"


def _summed(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for one in counts:
        for name, count in one.items():
            total[name] = total.get(name, 0) + count
    return total


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
