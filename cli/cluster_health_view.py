"""How what routers say of themselves is shown: as documents for programs, and as tables for people."""

from collections.abc import Sequence
from typing import Any

from google.protobuf.json_format import MessageToDict
from rich.table import Table
from rich.text import Text

from cli.cluster_moves_view import move_documents
from cli.terminal import console, printable_line
from local.errors import LocalClusterError
from local.router_admin import RouterAdmin
from memshard.admin.v1 import cluster_pb2 as pb

Document = dict[str, Any]

_STYLES = {"healthy": "green", "degraded": "yellow", "unhealthy": "red"}


def health_document(
    answers: "Sequence[tuple[RouterAdmin, pb.HealthReport | LocalClusterError]]", *, everything: bool
) -> Document:
    """`overall` is the worst of the routers' own; one that does not answer is unhealthy."""
    routers: list[Document] = []
    worst = pb.CONDITION_UNSPECIFIED
    for router, answer in answers:
        if isinstance(answer, LocalClusterError):
            worst = max(worst, pb.CONDITION_UNHEALTHY)
            routers.append({"router": router.name, "overall": "unhealthy", "error": str(answer), "checks": []})
        else:
            worst = max(worst, answer.overall)
            routers.append({"router": router.name, **_report(answer, everything=everything)})
    return {"overall": _condition(worst), "routers": routers}


def recovery_document(answers: "Sequence[tuple[RouterAdmin, pb.RecoverResponse | LocalClusterError]]") -> Document:
    """What each router tried, and how it found things before and, where it looked, after."""
    routers: list[Document] = []
    for router, answer in answers:
        if isinstance(answer, LocalClusterError):
            routers.append({"router": router.name, "error": str(answer), "attempts": []})
            continue
        document: Document = {
            "router": router.name,
            "attempts": [_attempt(attempt) for attempt in answer.attempts],
            "before": _report(answer.before, everything=False),
        }
        if answer.HasField("after"):
            document["after"] = _report(answer.after, everything=False)
        routers.append(document)
    return {"routers": routers}


def stats_document(answers: "Sequence[tuple[RouterAdmin, pb.GetStatsResponse | LocalClusterError]]") -> Document:
    """Everything that each router counts."""
    routers: list[Document] = []
    for router, answer in answers:
        if isinstance(answer, LocalClusterError):
            routers.append({"router": router.name, "error": str(answer)})
            continue
        document = MessageToDict(answer, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
        # 64-bit numbers travel as text in proto's JSON; these are small.
        document["epoch"] = answer.epoch
        document["hedges"]["sent"] = answer.hedges.sent
        document["entrance"] = {"shed": answer.entrance.shed}
        document["moves"] = move_documents(answer)
        document["cache"] |= {"entries": answer.cache.entries, "max_entries": answer.cache.max_entries}
        for level in document["levels"]:
            level["level"] = level["level"].removeprefix("DEGRADATION_LEVEL_").lower()
        for breaker in document["breakers"]:
            breaker["state"] = breaker["state"].removeprefix("BREAKER_STATE_").lower()
        document["recoveries"] = [_attempt(attempt) for attempt in answer.recoveries]
        routers.append({"router": router.name, **document})
    return {"routers": routers}


def show_health(document: Document) -> None:
    """A line for each router, and a table of its checks."""
    out = console()
    for router in document["routers"]:
        out.print(Text.assemble(router["router"], " is ", _coloured(router["overall"])))
        if "error" in router:
            out.print(printable_line(router["error"]), soft_wrap=True)
        if router["checks"]:
            out.print(_checks(router["checks"]))


def show_recovery(document: Document) -> None:
    """What was tried, and how it is now."""
    out = console()
    for router in document["routers"]:
        name = router["router"]
        if "error" in router:
            out.print(printable_line(router["error"]), soft_wrap=True)
            continue
        if not router["attempts"]:
            out.print(f"{name}: nothing to try; it finds everything {router['before']['overall']}")
        for attempt in router["attempts"]:
            what = f"{attempt['action']} {attempt['subject']}".strip()
            out.print(
                f"{name}: {what}, as {attempt['reason']} asks for: {attempt['outcome']}, {attempt['message']}",
                soft_wrap=True,
            )
        if "after" in router:
            out.print(Text.assemble(name, " is ", _coloured(router["after"]["overall"])))
            if router["after"]["checks"]:
                out.print(_checks(router["after"]["checks"]))


def show_stats(document: Document) -> None:
    """The levels and what they are decided from, and whatever is not as it should be."""
    out = console()
    for router in document["routers"]:
        if "error" in router:
            out.print(printable_line(router["error"]), soft_wrap=True)
            continue
        cache, hedges, retries = router["cache"], router["hedges"], router["retries"]
        out.print(f"{router['router']}: epoch {router['epoch']}, up for {router['uptime_s']:.0f} s")
        levels = Table("of", "level", "errors", "p99", "shed", "breakers", "pool", "CPU", box=None, pad_edge=False)
        for level in router["levels"]:
            levels.add_row(
                level["shard_id"] or "cluster",
                level["level"] + (" (set)" if level["set_by_operator"] else ""),
                f"{level['error_rate']:.1%}",
                f"{level['p99_latency_ms']:.0f} ms",
                f"{level['shed_share']:.1%}",
                f"{level['open_breakers_share']:.0%}",
                f"{level['pool_use']:.0%}",
                f"{level['cpu']:.0%}" if not level["shard_id"] else "",
            )
        out.print(levels)
        for breaker in router["breakers"]:
            if breaker["state"] != "closed":
                out.print(f"breaker of {breaker['callee']} for {breaker['kind']}: {breaker['state']}")
        out.print(
            f"{cache['entries']} of {cache['max_entries']} locations cached; {hedges['sent']} hedges sent; "
            f"room for {retries['budget_left']:.0f} retries; {router['entrance']['shed']} requests shed at the entrance"
        )


def _report(report: pb.HealthReport, *, everything: bool) -> Document:
    checks = [check for check in report.checks if everything or check.condition > pb.CONDITION_HEALTHY]
    return {"overall": _condition(report.overall), "checks": [_check(check) for check in checks]}


def _check(check: pb.Check) -> Document:
    return {
        "name": check.name,
        "subject": check.subject,
        "condition": _condition(check.condition),
        "figure": round(check.figure, 4) if check.HasField("figure") else None,
        "unit": check.unit,
        "message": check.message,
        "time": check.check_time.ToJsonString(),
    }


def _attempt(attempt: pb.RecoveryAttempt) -> Document:
    return {
        "time": attempt.time.ToJsonString(),
        "action": attempt.action,
        "subject": attempt.subject,
        "reason": attempt.reason,
        "outcome": pb.RecoveryOutcome.Name(attempt.outcome).removeprefix("RECOVERY_OUTCOME_").lower(),
        "message": attempt.message,
    }


def _condition(condition: pb.Condition.ValueType) -> str:
    return pb.Condition.Name(condition).removeprefix("CONDITION_").lower()


def _coloured(condition: str) -> Text:
    return Text(condition, style=_STYLES.get(condition, ""))


def _checks(checks: Sequence[Document]) -> Table:
    table = Table("check", "of", "condition", "figure", "", box=None, pad_edge=False)
    for check in checks:
        table.add_row(
            check["name"],
            check["subject"] or "-",
            _coloured(check["condition"]),
            _figure(check["figure"], check["unit"]),
            printable_line(check["message"]),
        )
    return table


def _figure(figure: float | None, unit: str) -> str:
    if figure is None:
        return "-"
    if unit == "share":
        return f"{figure:.0%}"
    return "-" if unit == "level" else f"{figure:.1f} {unit}"
