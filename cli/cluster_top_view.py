"""What `memshard top` shows: what the routers say, put together, as a document and as a screen of 80 columns."""

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cli.cluster_moves_view import move_documents, move_lines
from cli.terminal import console, printable_line
from local.errors import LocalClusterError
from local.router_admin import RouterAdmin
from memshard.admin.v1 import cluster_pb2 as pb
from memshard.v1.memory_pb2 import DegradationLevel

Document = dict[str, Any]
Answers = Sequence[tuple[RouterAdmin, pb.GetStatsResponse | LocalClusterError]]
HotAnswers = Sequence[tuple[RouterAdmin, pb.GetHotUsersResponse | LocalClusterError]]

_HOT_SHOWN = 5
_LONGEST_NAME = 26
_LONGEST_USER = 32
# Heading and width of the columns with numbers: with the two before them, 80 characters.
_NUMBERS = (("slots", 5), ("lag ms", 6), ("calls/s", 7), ("err/s", 6), ("p50 ms", 6), ("p99 ms", 6))
# Lines besides those of servers and moves: headings, empty lines, hot users.
_OTHER_LINES = 14


def document_of(stats: Answers, hot: HotAnswers, now: float) -> Document:
    """What several routers say is added up where it is a rate, and the worst of it where it is a state."""
    told = [answer for _, answer in stats if not isinstance(answer, LocalClusterError)]
    levels = _levels(told)
    shards = {shard.shard_id: shard for answer in told for shard in answer.shards}
    return {
        "time": datetime.fromtimestamp(now, UTC).isoformat(timespec="seconds"),
        "epoch": max((answer.epoch for answer in told), default=0),
        "level": levels.get("", "unknown"),
        "requests_per_s": round(sum(answer.requests_per_s for answer in told), 2),
        "routers": [_router(router, answer) for router, answer in stats],
        "shards": [
            {
                "shard_id": shard_id,
                "status": shard.status,
                "slots": shard.slots,
                "level": levels.get(shard_id, "unknown"),
                "servers": _servers(told, shard_id),
            }
            for shard_id, shard in sorted(shards.items())
        ],
        "breakers": [
            {
                "router": router.name,
                "callee": breaker.callee,
                "kind": breaker.kind,
                "state": _short(pb.BreakerState.Name(breaker.state), "BREAKER_STATE_"),
            }
            for router, answer in stats
            if not isinstance(answer, LocalClusterError)
            for breaker in answer.breakers
            if breaker.state != pb.BREAKER_STATE_CLOSED
        ],
        "moves": _moves(told),
        "hot_users": _hot_users(hot),
    }


def show(document: Document) -> None:
    """Prints it once."""
    console().print(rendered(document))


def rendered(document: Document, height: int | None = None) -> RenderableType:
    """The screen. With a `height`, what is not well comes first, and what does not fit is left out and counted."""
    parts: list[RenderableType] = [_heading(document)]
    parts += [
        Text(f"{router['router']}: {printable_line(router['error'])}", style="red")
        for router in document["routers"]
        if "error" in router
    ]
    moves = move_lines(document["moves"])
    room = None if height is None else height - _OTHER_LINES - len(moves)
    parts += ["", _server_table(document, room), "", *_breaker_lines(document), *moves]
    if document["hot_users"]:
        parts += ["", _hot_table(document["hot_users"][:_HOT_SHOWN])]
    return Group(*parts)


def _router(router: RouterAdmin, answer: pb.GetStatsResponse | LocalClusterError) -> Document:
    if isinstance(answer, LocalClusterError):
        return {"router": router.name, "error": str(answer)}
    return {
        "router": router.name,
        "uptime_s": round(answer.uptime_s, 1),
        "requests_per_s": round(answer.requests_per_s, 2),
        "retry_budget_left": round(answer.retries.budget_left, 1),
        "hedges_sent": answer.hedges.sent,
        "shed_at_entrance": answer.entrance.shed,
    }


def _levels(told: Iterable[pb.GetStatsResponse]) -> dict[str, str]:
    worst: dict[str, int] = {}
    for answer in told:
        for level in answer.levels:
            worst[level.shard_id] = max(worst.get(level.shard_id, 0), level.level)
    return {
        shard_id: _short(DegradationLevel.Name(DegradationLevel.ValueType(level)), "DEGRADATION_LEVEL_")
        for shard_id, level in worst.items()
    }


def _servers(told: Iterable[pb.GetStatsResponse], shard_id: str) -> list[Document]:
    found: dict[str, list[pb.ServerStats]] = {}
    for answer in told:
        for server in answer.servers:
            if server.shard_id == shard_id:
                found.setdefault(server.replica_id, []).append(server)
    return [
        {
            "server": replica_id or shard_id,
            "role": "replica" if replica_id else "primary",
            "serving": all(server.serving for server in seen),
            "lag_ms": max(server.lag_ms for server in seen) if replica_id else None,
            "calls_per_s": round(sum(server.calls_per_s for server in seen), 2),
            "errors_per_s": round(sum(server.errors_per_s for server in seen), 2),
            "p50_ms": round(max(server.p50_ms for server in seen), 2),
            "p99_ms": round(max(server.p99_ms for server in seen), 2),
            "in_flight": sum(server.in_flight for server in seen),
        }
        for replica_id, seen in sorted(found.items())
    ]


def _moves(told: Sequence[pb.GetStatsResponse]) -> list[Document] | None:
    """As the router says that heard from the catalog last."""
    heard = [answer for answer in told if answer.HasField("moves_age_s")]
    return move_documents(min(heard, key=lambda answer: answer.moves_age_s)) if heard else None


def _hot_users(answers: HotAnswers) -> list[Document]:
    calls: dict[tuple[str, str, str], float] = {}
    total = 0.0
    for _, answer in answers:
        if isinstance(answer, LocalClusterError):
            continue
        total += next((user.calls / user.share for user in answer.users if user.share), 0.0)
        for user in answer.users:
            key = user.user, user.operation, user.shard_id
            calls[key] = calls.get(key, 0.0) + user.calls
    most = sorted(calls.items(), key=lambda item: item[1], reverse=True)
    return [
        {"user": user, "operation": operation, "shard_id": shard_id, "calls": round(count, 1), "share": count / total}
        for (user, operation, shard_id), count in most
    ]


def _heading(document: Document) -> Text:
    level = document["level"]
    clock = document["time"][11:19]
    return Text.assemble(
        ("memshard", "bold"),
        f"  {document['requests_per_s']:.0f} requests/s  level ",
        (level, "green" if level == "normal" else "yellow"),
        f"  epoch {document['epoch']}  {clock} UTC",
    )


def _server_table(document: Document, room: int | None) -> Table:
    """All servers, or as many as there is room for."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("server", width=_LONGEST_NAME, no_wrap=True)
    table.add_column("state", width=11, no_wrap=True)
    for name, width in _NUMBERS:
        table.add_column(name, width=width, justify="right", no_wrap=True)
    shards = document["shards"]
    if room is not None:
        shards = sorted(shards, key=lambda shard: (not _is_troubled(shard), shard["shard_id"]))
    rows = [(shard, server) for shard in shards for server in shard["servers"]]
    most = len(rows) if room is None else max(3, room)
    for shard, server in rows[:most]:
        is_primary = server["role"] == "primary"
        name = server["server"] if is_primary else f"  {server['server'].removeprefix(shard['shard_id'] + '-')}"
        table.add_row(
            _cut(name, _LONGEST_NAME),
            _state(shard, server),
            str(shard["slots"]) if is_primary else "",
            "" if server["lag_ms"] is None or not server["serving"] else _ms(server["lag_ms"]),
            f"{server['calls_per_s']:.1f}",
            Text(f"{server['errors_per_s']:.1f}", style="red" if server["errors_per_s"] else ""),
            _ms(server["p50_ms"]),
            _ms(server["p99_ms"]),
        )
    if len(rows) > most:
        table.add_row(f"… and {len(rows) - most} more", *[""] * 7)
    return table


def _is_troubled(shard: Document) -> bool:
    servers = shard["servers"]
    return shard["level"] != "normal" or any(not server["serving"] or server["errors_per_s"] for server in servers)


def _state(shard: Document, server: Document) -> Text:
    if not server["serving"]:
        return Text("away", style="bold red")
    if server["role"] == "replica":
        return Text("serving", style="green")
    if shard["status"] != "active":
        return Text(shard["status"], style="yellow")
    return Text(shard["level"], style="green" if shard["level"] == "normal" else "yellow")


def _breaker_lines(document: Document) -> list[RenderableType]:
    if not document["breakers"]:
        return ["All breakers are closed."]
    styles = {"open": "bold red", "half_open": "yellow"}
    lines: list[RenderableType] = []
    for breaker in document["breakers"][:5]:
        state = breaker["state"]
        lines.append(
            Text.assemble(
                "breaker ",
                (state.replace("_", "-"), styles.get(state, "")),
                f"  {printable_line(breaker['callee'])}, {breaker['kind']} calls of {breaker['router']}",
            )
        )
    if len(document["breakers"]) > len(lines):
        lines.append(f"… and {len(document['breakers']) - len(lines)} more breakers that are not closed")
    return lines


def _hot_table(users: Sequence[Document]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("hot user", width=_LONGEST_USER, no_wrap=True)
    table.add_column("operation", width=20, no_wrap=True)
    table.add_column("shard", width=12, no_wrap=True)
    table.add_column("share", width=6, justify="right")
    for user in users:
        table.add_row(
            _cut(printable_line(user["user"]), _LONGEST_USER),
            user["operation"],
            user["shard_id"],
            f"{user['share']:.0%}",
        )
    return table


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"


def _ms(value: float) -> str:
    """Milliseconds in at most six characters."""
    return f"{value:.1f}" if value < 100 else f"{min(value, 999_999):.0f}"


def _short(name: str, prefix: str) -> str:
    return name.removeprefix(prefix).lower()
