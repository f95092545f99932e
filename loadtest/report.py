"""What a load test came to, for people as ghz prints it, and for programs in the shape of ghz's JSON. Pure."""

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from loadtest.engine import Outcome
from loadtest.histogram import Histogram
from loadtest.tally import Outcomes

# ghz's (github.com/bojand/ghz, runner/reporter.go), and one more for those who promise it.
_PERCENTAGES = (10, 25, 50, 75, 90, 95, 99, 99.9)
_BARS = 10
_WIDTH = 40
_NANOSECONDS = 1_000_000_000
# A generator that is later than this with a call has not enough processors for the load, and measures itself.
_LATE_S = 0.05


def text(outcome: Outcome) -> str:
    """For people."""
    return "\n".join(_lines(outcome)) + "\n"


def document(outcome: Outcome) -> dict[str, Any]:
    """For programs: ghz's fields at the top, times in nanoseconds, and the same for each operation."""
    profile = outcome.profile
    return {
        "name": profile.name,
        "endReason": outcome.end,
        "options": {
            "host": outcome.address,
            "client": outcome.client,
            "concurrency": profile.concurrency,
            "rps": profile.rate,
            "duration": _ns(profile.duration_s),
            "timeout": _ns(profile.timeout_s),
            "profile": profile.model_dump(mode="json"),
        },
        "date": datetime.fromtimestamp(outcome.began, UTC).isoformat(),
        **_figures(outcome.tally.all(), outcome.tally.seconds),
        "operations": {
            name: _figures(outcomes, outcome.tally.seconds)
            for name, outcomes in sorted(outcome.tally.operations.items())
        },
        "generator": {"latest": _ns(outcome.tally.late_s), "cutOff": outcome.tally.cut_off},
        "limitsExceeded": exceeded(outcome),
    }


def exceeded(outcome: Outcome) -> list[str]:
    """Which of the profile's limits do not hold, in words."""
    limits, whole = outcome.profile.limits, outcome.tally.all()
    found = []
    failed = whole.count - whole.latency.count + outcome.tally.cut_off
    if limits.errors is not None and failed > limits.errors * (whole.count + outcome.tally.cut_off):
        found.append(f"{failed} of {whole.count + outcome.tally.cut_off} calls failed")
    for operation, limit_ms in limits.p99_ms.items():
        latency = outcome.tally.of(operation).latency
        if (measured_ms := 1000 * latency.percentile(0.99)) > limit_ms:
            found.append(f"p99 of {operation}: {measured_ms:.1f} ms, at most {limit_ms:g} ms")
    ratio = whole.cache_hit_ratio or 0.0
    if limits.cache_hit_ratio is not None and ratio < limits.cache_hit_ratio:
        found.append(f"cache hit ratio of reads: {ratio:.3f}, at least {limits.cache_hit_ratio:g}")
    if limits.levels is not None and whole.levels:
        found.append(f"answers under a degradation level: {_counted(whole.levels)}")
    return found


def _lines(outcome: Outcome) -> Iterator[str]:
    whole, seconds = outcome.tally.all(), outcome.tally.seconds
    latency = whole.latency
    yield "Summary:"
    if outcome.profile.name:
        yield f"  Name:\t\t{outcome.profile.name}"
    yield f"  Count:\t{whole.count}"
    yield f"  Total:\t{_time(seconds)}"
    yield f"  Slowest:\t{_time(latency.slowest)}"
    yield f"  Fastest:\t{_time(latency.fastest)}"
    yield f"  Average:\t{_time(latency.average)}"
    yield f"  Requests/sec:\t{whole.count / seconds if seconds else 0:.2f}"
    yield ""
    yield "Response time histogram:"
    for mark, count in histogram(latency):
        bar = "∎" * round(_WIDTH * count / max(1, latency.count))
        yield f"  {f'{1000 * mark:.3f}':<10} [{count}]\t|{bar}"
    yield ""
    yield "Latency distribution:"
    for percentage in _PERCENTAGES if latency.count else ():
        yield f"  {percentage:g} % in {_time(latency.percentile(percentage / 100))} "
    yield ""
    if len(outcome.tally.operations) > 1:
        yield "Operations:"
        yield f"  {'':<12}{'count':>9}{'req/sec':>11}{'p50':>12}{'p95':>12}{'p99':>12}{'errors':>9}"
        for name, one in sorted(outcome.tally.operations.items()):
            p50, p95, p99 = (_time(one.latency.percentile(share)) for share in (0.5, 0.95, 0.99))
            rate = one.count / seconds if seconds else 0
            failed = one.count - one.latency.count
            yield f"  {name:<12}{one.count:>9}{rate:>11.1f}{p50:>12}{p95:>12}{p99:>12}{failed:>9}"
        yield ""
    yield "Status code distribution:"
    for code, count in sorted(whole.codes.items()):
        yield f"  [{code}]\t{count} responses"
    if whole.errors:
        yield ""
        yield "Error distribution:"
        for name, count in sorted(whole.errors.items()):
            yield f"  [{count}]\t{name}"
    if (ratio := whole.cache_hit_ratio) is not None:
        yield ""
        yield f"Cache hit ratio of reads: {ratio:.3f} ({whole.cached} of {whole.reads})"
    if whole.levels:
        yield ""
        yield f"Answers under a degradation level: {_counted(whole.levels)}"
    yield from _remarks(outcome)


def _remarks(outcome: Outcome) -> Iterator[str]:
    remarks = []
    if outcome.end == "cancel":
        remarks.append("It was ended early.")
    if outcome.tally.cut_off:
        remarks.append(f"{outcome.tally.cut_off} calls had no answer in the end.")
    if outcome.tally.late_s > _LATE_S:
        remarks.append(
            f"Some calls were begun {_time(outcome.tally.late_s)} late: the machine that makes them is the limit."
        )
    remarks += [f"Limit exceeded: {limit}." for limit in exceeded(outcome)]
    if remarks:
        yield ""
        yield from remarks


def histogram(latency: Histogram) -> list[tuple[float, int]]:
    """ghz's: marks from the fastest to the slowest at equal distances in seconds, and how many took up to each."""
    if not latency.count:
        return []
    fastest, slowest = latency.fastest, latency.slowest
    marks = [fastest + (slowest - fastest) * number / _BARS for number in range(_BARS)] + [slowest]
    counts = [0] * len(marks)
    at = 0
    for seconds, count in latency.values():
        while seconds > marks[at] and at < len(marks) - 1:
            at += 1
        counts[at] += count
    return list(zip(marks, counts, strict=True))


def _figures(outcomes: Outcomes, seconds: float) -> dict[str, Any]:
    latency = outcomes.latency
    return {
        "count": outcomes.count,
        "total": _ns(seconds),
        "average": _ns(latency.average),
        "fastest": _ns(latency.fastest),
        "slowest": _ns(latency.slowest),
        "rps": outcomes.count / seconds if seconds else 0.0,
        "statusCodeDistribution": dict(sorted(outcomes.codes.items())),
        "errorDistribution": dict(sorted(outcomes.errors.items())),
        "latencyDistribution": [
            {"percentage": percentage, "latency": _ns(latency.percentile(percentage / 100))}
            for percentage in _PERCENTAGES
            if latency.count
        ],
        "histogram": [
            {"mark": mark, "count": count, "frequency": count / latency.count} for mark, count in histogram(latency)
        ],
        "cacheHitRatio": outcomes.cache_hit_ratio,
        "degradationLevels": dict(sorted(outcomes.levels.items())),
    }


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} at {name}" for name, count in sorted(counts.items()))


def _ns(seconds: float) -> int:
    return round(seconds * _NANOSECONDS)


def _time(seconds: float) -> str:
    """As ghz prints it: 1.23 s, 4.56 ms."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.2f} ms"
