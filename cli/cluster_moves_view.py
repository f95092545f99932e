"""How moves of slots that are not over are shown, as routers see them: documents, and a line each."""

from typing import Any

from rich.text import Text

from cli.terminal import printable_line
from memshard.admin.v1 import cluster_pb2 as pb

Document = dict[str, Any]

_SHOWN = 3
_LONGEST_NAME = 14


def move_documents(answer: pb.GetStatsResponse) -> list[Document] | None:
    """What a router was told last; None when it knows nothing of moves."""
    if not answer.HasField("moves_age_s"):
        return None
    return [
        {
            "move_id": seen.move.move_id,
            "first_slot": seen.move.first_slot,
            "last_slot": seen.move.last_slot,
            "source": seen.move.source,
            "target": seen.move.target,
            "step": seen.move.step,
            "attempts": seen.move.attempts,
            "rows": seen.move.rows,
            "stopped": seen.stopped,
            "error": seen.move.error,
        }
        for seen in answer.moves
    ]


def move_lines(moves: list[Document] | None) -> list[Text]:
    """The oldest of them and how many more there are, each within 80 columns."""
    if moves is None:
        return [Text("Whether slots are being moved is not known.")]
    if not moves:
        return [Text("No slots are being moved.")]
    lines = [_line(move) for move in moves[:_SHOWN]]
    if len(moves) > _SHOWN:
        lines.append(Text(f"… and {len(moves) - _SHOWN} more moves that are not over"))
    return lines


def _line(move: Document) -> Text:
    slots = move["last_slot"] - move["first_slot"] + 1
    step = move["step"].replace("_", "-")
    return Text.assemble(
        f"move {move['move_id']}  {slots:,} slots  {_cut(move['source'])} → {_cut(move['target'])}  ",
        (f"stopped at {step}", "yellow") if move["stopped"] else (step, "cyan"),
        no_wrap=True,
        overflow="ellipsis",
    )


def _cut(name: str) -> str:
    name = printable_line(name)
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"
