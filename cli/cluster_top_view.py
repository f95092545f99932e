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
Answer = tuple[RouterAdmin, pb.GetStatsResponse | LocalClusterError]
HotAnswer = tuple[RouterAdmin, pb.GetHotUsersResponse | LocalClusterError]

_HOT_SHOWN = 5
_LONGEST_NAME = 26
_LONGEST_USER = 32
# Heading and width of the columns with numbers: with the two before them, 80 characters.
_NUMBERS = (("slots", 5), ("lag ms", 6), ("calls/s", 7), ("err/s", 6), ("p50 ms", 6), ("p99 ms", 6))
# Lines about breakers at most, without the one that counts the others.
_MOST_BREAKERS = 5
# Rows of servers for which hot users give way where a terminal is too low for both.
_FEWEST_ROWS = 6


def document_of(stats: Sequence[Answer], hot: Sequence[HotAnswer], now: float) -> Document:
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
    """The screen, with what is not well first. With a `height`, what does not fit is left out and counted."""
    above: list[RenderableType] = [_heading(document), *_router_errors(document, one_line=height is not None), ""]
    below: list[RenderableType] = [
        "",
        *_breaker_lines(document["breakers"]),
        *_level_lines(document["shards"]),
        *move_lines(document["moves"]),
    ]
    hot = document["hot_users"][:_HOT_SHOWN]
    hot_lines = 2 + len(hot) if hot else 0
    room = None
    if height is not None:
        # Each part is a line, and the table has one with its headings.
        room = height - len(above) - 1 - len(below) - hot_lines
        rows = sum(len(shard["servers"]) for shard in document["shards"])
        if room < min(rows, _FEWEST_ROWS):
            hot, room = [], room + hot_lines
    parts = [*above, _server_table(document, room), *below]
    return Group(*parts, "", _hot_table(hot)) if hot else Group(*parts)


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


def _hot_users(answers: Sequence[HotAnswer]) -> list[Document]:
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


def _router_errors(document: Document, *, one_line: bool) -> list[Text]:
    return [
        Text(
            f"{router['router']}: {printable_line(router['error'])}",
            style="red",
            no_wrap=one_line,
            overflow="ellipsis" if one_line else None,
        )
        for router in document["routers"]
        if "error" in router
    ]


def _server_table(document: Document, room: int | None) -> Table:
    """All servers, or as many as there is room for: of shards in trouble first."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("server", width=_LONGEST_NAME, no_wrap=True)
    table.add_column("state", width=11, no_wrap=True)
    for name, width in _NUMBERS:
        table.add_column(name, width=width, justify="right", no_wrap=True)
    broken = {_shard_of(breaker) for breaker in document["breakers"]}
    shards = sorted(
        document["shards"],
        key=lambda shard: (shard["shard_id"] not in broken and not _is_troubled(shard), shard["shard_id"]),
    )
    rows = [(shard, server) for shard in shards for server in shard["servers"]]
    # One line says how many more there are.
    most = len(rows) if room is None or len(rows) <= room else max(3, room - 1)
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
            # Of a server that has answered nothing, nothing is known.
            _ms(server["p50_ms"]) if server["p50_ms"] else "-",
            _ms(server["p99_ms"]) if server["p99_ms"] else "-",
        )
    if len(rows) > most:
        table.add_row(f"… and {len(rows) - most} more", *[""] * 7)
    return table


def _is_troubled(shard: Document) -> bool:
    servers = shard["servers"]
    return shard["level"] != "normal" or any(not server["serving"] or server["errors_per_s"] for server in servers)


def _shard_of(breaker: Document) -> str:
    """The shard of a breaker; that of what is no shard has another name."""
    return str(breaker["callee"]).partition("/")[0]


def _state(shard: Document, server: Document) -> Text:
    if server["role"] == "replica":
        return Text("serving", style="green") if server["serving"] else Text("away", style="bold red")
    if not server["serving"]:
        # Calls of one kind at least: on a full disk reads are answered all the same.
        return Text("failing", style="bold red")
    if shard["status"] != "active":
        return Text(shard["status"], style="yellow")
    return Text(shard["level"], style="green" if shard["level"] == "normal" else "yellow")


def _breaker_lines(breakers: Sequence[Document]) -> list[RenderableType]:
    """A line for each callee and state, with the kinds of calls and the routers that they are of."""
    if not breakers:
        return ["All breakers are closed."]
    kinds: dict[tuple[str, str, str], list[str]] = {}
    for breaker in breakers:
        kinds.setdefault((breaker["state"], breaker["callee"], breaker["router"]), []).append(breaker["kind"])
    routers: dict[tuple[str, str, str], list[str]] = {}
    for (state, callee, router), of_router in kinds.items():
        routers.setdefault((state, callee, ", ".join(of_router)), []).append(router)
    styles = {"open": "bold red", "half_open": "yellow"}
    # Open before half-open.
    found = sorted(routers.items(), key=lambda item: item[0][0] != "open")
    lines: list[RenderableType] = [
        Text.assemble(
            "breaker ",
            (state.replace("_", "-"), styles.get(state, "")),
            f"  {printable_line(callee)}: {calls} calls of {', '.join(names)}",
            no_wrap=True,
            overflow="ellipsis",
        )
        for (state, callee, calls), names in found[:_MOST_BREAKERS]
    ]
    if len(found) > len(lines):
        lines.append(f"… and {len(found) - len(lines)} more like these")
    return lines


def _level_lines(shards: Sequence[Document]) -> list[RenderableType]:
    """The levels that the table does not say, since it says there that a primary fails."""
    hidden: dict[str, list[str]] = {}
    for shard in shards:
        failing = any(server["role"] == "primary" and not server["serving"] for server in shard["servers"])
        if shard["level"] != "normal" and failing:
            hidden.setdefault(shard["level"], []).append(shard["shard_id"])
    return [
        Text.assemble("level ", (level, "yellow"), f"  {', '.join(names)}", no_wrap=True, overflow="ellipsis")
        for level, names in sorted(hidden.items())
    ]


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
