"""`memshard moves …`, and how moves are shown while they go on: a bar for each, or a JSON object a line."""

# ruff: noqa: PLC0415  # The embedded cluster is imported inside its commands: `memshard add` should not wait for it.

import asyncio
from datetime import UTC
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from cli.cluster_options import DataDir, failures_shown
from cli.terminal import console, fail
from common.moves import MAX_ROLLBACK_WINDOW_S

if TYPE_CHECKING:
    from google.protobuf.message import Message
    from rich.progress import Progress, TaskID

    from local.layout import Layout
    from memshard.admin.v1.cluster_pb2 import (
        DrainShardRequest,
        Move,
        MoveProgress,
        MoveState,
        RebalanceRequest,
        ResumeMoveRequest,
    )

    R = TypeVar("R", RebalanceRequest, DrainShardRequest, ResumeMoveRequest)

_INTERRUPTED = 130

Json = Annotated[bool, typer.Option("--json", help="Print JSON, one line for each thing that happens.")]
MaxRate = Annotated[
    int,
    typer.Option(
        "--max-rate", metavar="ROWS", min=0, max=10**9, help="Most rows a second, on average. Default: no bound."
    ),
]


def _rollback_window(told: str) -> Any:
    return typer.Option("--rollback-window", metavar="SECONDS", min=0, max=MAX_ROLLBACK_WINDOW_S, help=told)


RollbackWindow = Annotated[
    float | None, _rollback_window("How long each range can be brought back after it has moved. Default: 30.")
]
MaxSlots = Annotated[
    int | None,
    typer.Option(
        "--max-slots",
        metavar="SLOTS",
        min=1,
        max=16384,
        help="Most slots that move together; with fewer the pace is closer, and all of it takes longer. Default: 1024.",
    ),
]
ResumedWindow = Annotated[
    float | None,
    _rollback_window("How long they can be brought back after they have moved. Default: as each was begun with."),
]
# The lease of a move is a lock whose number has 32 bits.
_MAX_ID = 2**31 - 1
MoveId = Annotated[
    int,
    typer.Argument(metavar="MOVE", min=1, max=_MAX_ID, help="The move's number, as `memshard moves list` shows it."),
]

# What is over at each step, of 100: so that a bar goes on moving after the copy, which takes most of the time.
_PROGRESS = {
    "planned": 0,
    "copying": 5,
    "verifying": 70,
    "reversing": 85,
    "fenced": 90,
    "cut_over": 92,
    "active": 95,
    "cleaning": 97,
    "done": 100,
    "returning": 60,
    "returned": 80,
    "rolling_back": 90,
    "rolled_back": 100,
}
_COPYING_ENDS = 70


def register(app: typer.Typer) -> None:
    """Adds the commands to app."""
    moves = typer.Typer(help="Show, resume and roll back moves of slots between shards.", no_args_is_help=True)
    moves.command("list")(list_)
    moves.command()(resume)
    moves.command()(rollback)
    app.add_typer(moves, name="moves")


def list_(
    every: Annotated[bool, typer.Option("--all", help="Those that are over as well.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    data_dir: DataDir = None,
) -> None:
    """Show the moves that are not over."""
    from google.protobuf.json_format import MessageToJson

    from local.admin_client import list_moves
    from local.layout import Layout

    with failures_shown():
        found = asyncio.run(list_moves(Layout.of(data_dir)))
    if not every:
        kept = [move for move in found.moves if move.step not in ("done", "rolled_back")]
        del found.moves[:]
        found.moves.extend(kept)
    if json:
        typer.echo(MessageToJson(found, preserving_proto_field_name=True, always_print_fields_with_no_presence=True))
        return
    if not found.moves:
        typer.echo("No move is open." if not every else "There has been no move.")
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("move", "slots", "from", "to", "step", "rollback until", "why"):
        table.add_column(name)
    for move in found.moves:
        slots = f"{move.first_slot}-{move.last_slot}"
        table.add_row(str(move.move_id), slots, move.source, move.target, move.step, _until(move), move.error)
    console().print(table)


def resume(
    move: Annotated[
        int | None, typer.Argument(metavar="[MOVE]", min=1, max=_MAX_ID, help="One move. Default: all that are open.")
    ] = None,
    max_rate: MaxRate = 0,
    rollback_window: ResumedWindow = None,
    json: Json = False,
    data_dir: DataDir = None,
) -> None:
    """Bring moves that are open to their end, whatever step they were stopped at."""
    from memshard.admin.v1.cluster_pb2 import ResumeMoveRequest

    request = request_of(ResumeMoveRequest(move_id=move or 0), max_rate, rollback_window)
    follow_moves("ResumeMove", request, data_dir, as_lines=json, nothing="There is nothing to resume.")


def rollback(
    move: MoveId,
    target_lost: Annotated[
        bool,
        typer.Option("--target-lost", help="Its target never comes back: end the move on its source alone."),
    ] = False,
    json: Json = False,
    data_dir: DataDir = None,
) -> None:
    """Bring the slots of a move back to where they were, with all that was written to them since."""
    from memshard.admin.v1.cluster_pb2 import RollbackMoveRequest

    request = RollbackMoveRequest(move_id=move, target_lost=target_lost)
    follow_moves("RollbackMove", request, data_dir, as_lines=json, nothing="It has been rolled back already.")


def request_of(request: "R", max_rate: int, rollback_window: float | None) -> "R":
    """The request with the options of all commands that move."""
    request.max_rate = max_rate
    if rollback_window is not None:
        request.rollback_window_s = rollback_window
    return request


def follow_moves(rpc: str, request: "Message", data_dir: Path | None, *, as_lines: bool, nothing: str = "") -> None:
    """Runs an rpc that moves slots, and shows what it tells, or to people `nothing` when that is nothing. Ctrl-C leaves
    moves that can be resumed.
    """
    from local.layout import Layout

    with failures_shown():
        try:
            told = asyncio.run(_follow(Layout.of(data_dir), rpc, request, as_lines=as_lines))
        except KeyboardInterrupt:
            fail("stopped; `memshard moves resume` goes on where it was", code=_INTERRUPTED)
    if nothing and not told and not as_lines:
        typer.echo(nothing)


async def _follow(layout: "Layout", rpc: str, request: "Message", *, as_lines: bool) -> int:
    """How much it told."""
    from local.admin_client import follow

    events, told = follow(layout, rpc, request), 0
    if as_lines:
        async for progress in events:
            typer.echo(as_line(progress))
            told += 1
        return told
    with _bars() as bars:
        view = _View(bars)
        async for progress in events:
            view.show(progress)
            told += 1
    return told


def as_line(message: "Message") -> str:
    """A message as JSON in one line, with what is 0 or empty too: whoever reads it need not know the defaults."""
    from google.protobuf.json_format import MessageToJson

    return MessageToJson(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True, indent=None
    )


class _View:
    """A bar for each move, and a line for each that is over."""

    def __init__(self, bars: "Progress") -> None:
        self._bars = bars
        self._tasks: dict[int, TaskID] = {}

    def show(self, progress: "MoveProgress") -> None:
        """Shows one event."""
        kind = progress.WhichOneof("event")
        if kind == "plan":
            self._plan(progress.plan.slots, list(progress.plan.moves))
        elif kind == "wait":
            self._print(f"Waiting for {', '.join(progress.wait.shard_ids)}, which has enough to do")
        elif kind == "state":
            self._state(progress.state)

    def _plan(self, slots: int, moves: "list[Move]") -> None:
        if not moves:
            self._print("Every shard has its share; nothing is to be moved.")
            return
        self._print(f"{slots:,} slots are to be moved, in {len(moves)} ranges:")
        for move in moves:
            self._print(f"  {_range(move)}")

    def _state(self, state: "MoveState") -> None:
        move = state.move
        task = self._tasks.get(move.move_id)
        if task is None:
            task = self._tasks[move.move_id] = self._bars.add_task(
                f"{move.move_id:>3} {_range(move)}", total=100, figures=""
            )
        done = _PROGRESS.get(move.step, 0)
        if move.step == "copying" and state.total_rows:
            done += round((_COPYING_ENDS - done) * state.rows / state.total_rows)
        figures = [move.step]
        if state.total_rows:
            figures.append(f"{state.rows:,} of {state.total_rows:,} rows, {state.rows_per_s:,.0f}/s")
        if state.HasField("lag_ms"):
            figures.append(f"lag {state.lag_ms:.0f} ms")
        if move.error:
            figures.append(move.error)
        self._bars.update(task, completed=done, figures=", ".join(figures))
        if state.HasField("pause_ms"):
            given_up = ", and given up" if move.error and move.step != "active" else ""
            self._print(f"{_range(move)} in {state.pause_ms:.0f} ms without writes{given_up}")
        if move.step in ("done", "rolled_back"):
            self._bars.remove_task(self._tasks.pop(move.move_id))
            self._print(f"{_range(move)}: {move.step.replace('_', ' ')}")

    def _print(self, text: str) -> None:
        self._bars.console.print(text, soft_wrap=True, markup=False, highlight=False)


def _bars() -> "Progress":
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    out = console()
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}", markup=False),
        console=out,
        transient=True,
        # Where there are no bars to be seen, they would leave an empty line behind.
        disable=not out.is_terminal,
    )


def _until(move: "Move") -> str:
    """By the clock of whoever looks; nothing for a move that has not gone over, or cannot be brought back."""
    if not move.HasField("rollback_until_time"):
        return ""
    return f"{move.rollback_until_time.ToDatetime(UTC).astimezone():%Y-%m-%d %H:%M:%S}"


def _range(move: "Move") -> str:
    return f"slots {move.first_slot} to {move.last_slot} from {move.source} to {move.target}"
