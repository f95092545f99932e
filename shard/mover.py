"""The mover: `python -m shard.mover [--config FILE] COMMAND`. It does one thing to the cluster's slots, and ends.

| command | what it does |
|---|---|
| plan | says which moves `rebalance` would make |
| rebalance | finishes what is open, then moves slots until each shard has its share |
| move --first N --last N --to ID | moves slots of one shard to another, whatever the weights say |
| drain --shard ID | moves all slots off a shard, which gets none from now on |
| resume [--move N] [--rollback-window S] | brings the moves that are open to their end |
| rollback --move N [--target-lost] | brings the slots of a move back to where they were |
| recover [--every SECONDS] | ends the fences that a mover left behind that was killed or hangs; again and again |
| list | says which moves there were |
| add --shard ID --address HOST:PORT [--replica ID=HOST:PORT …] [--weight N] | registers a shard without slots |
| remove --shard ID | takes a shard without slots out of the catalog |
| set --shard ID [--status S] [--weight N] | says what a shard may be used for, and its share |
| pin --user ID --shard ID, pin --slot N --shard ID, unpin … | has a user's slot stay on a shard |
| rebuild --shard ID=HOST:PORT … | makes a lost catalog again from what the shards say |

What happens is told on standard output, a JSON object a line; the last one is `{"event": "done"}` or `{"event":
"failed", "why": …}`, and the exit code 0 or 1. Logs go to standard error. SIGTERM and SIGINT end it where it can be
resumed. Settings come from the environment (`MEMSHARD_MOVER_…`) and a file, like those of the services.
"""

import argparse
import asyncio
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import asyncpg
import uvloop

from common import config, logs
from common.catalog import CatalogError, PlacementStrategy
from common.config import ConfigError, MoverSettings
from common.moves import MAX_ROLLBACK_WINDOW_S, Move
from common.postgres import DatabaseUnreachableError
from common.slots import SLOT_COUNT, slot_of
from common.topology import Replica, Shard, ShardStatus
from shard.moving import rebuild
from shard.moving.mover import Mover
from shard.moving.moving import MoveError
from shard.moving.ownership import OwnershipError
from shard.moving.plan import PlanError
from shard.moving.side import SideError
from shard.moving.streams import StreamError

_log = logs.get_logger("mover")

_EXPECTED = (
    MoveError,
    StreamError,
    OwnershipError,
    SideError,
    PlanError,
    CatalogError,
    ConfigError,
    DatabaseUnreachableError,
    asyncpg.PostgresError,
)


def arguments_of(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m shard.mover", description="Moves slots between shards.")
    parser.add_argument("--config", type=Path, help="YAML file with settings; MEMSHARD_MOVER_… variables come first")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("plan", help="say which moves rebalance would make")
    commands.add_parser("rebalance", help="move slots until each shard has its share")
    commands.add_parser("list", help="say which moves there were")
    recover = commands.add_parser("recover", help="end the fences of movers that were killed or hang")
    recover.add_argument(
        "--every", type=_interval, metavar="SECONDS", help="look again and again, until told to end; default: once"
    )
    by_hand = commands.add_parser("move", help="move slots of one shard to another")
    for name in ("first", "last"):
        by_hand.add_argument(f"--{name}", type=int, metavar="N", required=True)
    by_hand.add_argument("--to", metavar="ID", required=True)
    drain = commands.add_parser("drain", help="move all slots off a shard")
    resume = commands.add_parser("resume", help="bring open moves to their end")
    resume.add_argument("--move", type=int, metavar="N", help="one of them; default: all that nobody drives")
    resume.add_argument(
        "--rollback-window",
        type=_window,
        metavar="SECONDS",
        help="how long they can be brought back from now on; default: as each was made",
    )
    rollback = commands.add_parser("rollback", help="bring the slots of a move back")
    rollback.add_argument("--move", type=int, metavar="N", required=True)
    rollback.add_argument("--target-lost", action="store_true", help="the target never comes back: do without it")
    add = commands.add_parser("add", help="register a shard without slots")
    add.add_argument("--address", required=True, metavar="HOST:PORT", help="where its service listens")
    add.add_argument("--replica", action="append", default=[], metavar="ID=HOST:PORT", type=_named_address)
    add.add_argument("--weight", type=int, default=1, metavar="N")
    change = commands.add_parser("set", help="say what a shard may be used for, and what its share is")
    change.add_argument("--status", choices=[status.value for status in ShardStatus])
    change.add_argument("--weight", type=int, metavar="N")
    remove = commands.add_parser("remove", help="take a shard without slots out of the catalog")
    for command in (drain, add, remove, change):
        command.add_argument("--shard", required=True, metavar="ID")
    for name in ("pin", "unpin"):
        command = commands.add_parser(name, help="say where a user's slot is to stay, or that it need not")
        whose = command.add_mutually_exclusive_group(required=True)
        whose.add_argument("--user", metavar="ID", help="of a cluster placed by user")
        whose.add_argument("--slot", type=int, metavar="N")
        if name == "pin":
            command.add_argument("--shard", required=True, metavar="ID")
    again = commands.add_parser("rebuild", help="make a lost catalog again from what the shards say")
    again.add_argument("--shard", action="append", required=True, metavar="ID=HOST:PORT", type=_named_address)
    again.add_argument("--replica", action="append", default=[], metavar="SHARD/ID=HOST:PORT", type=_named_address)
    again.add_argument(
        "--token-key-file", type=Path, metavar="FILE", help="the old token key, 32 bytes; else a new one"
    )
    return parser.parse_args(argv)


async def main(settings: MoverSettings, arguments: argparse.Namespace) -> int:
    """Does it; the exit code."""
    mover = Mover(settings, _tell)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, mover.stop)
    try:
        result = await _done(mover, settings, arguments)
    except _EXPECTED as error:
        _tell({"event": "failed", "why": str(error) or type(error).__name__})
        return 1
    except Exception as bug:
        _log.error("failed by a bug", **logs.describe_bug(bug))
        _tell({"event": "failed", "why": "by a bug; the log says where"})
        return 1
    _tell({"event": "done", **result})
    return 0


async def _done(mover: Mover, settings: MoverSettings, given: argparse.Namespace) -> dict[str, Any]:
    """What moves slots, and tells all that happens; else what has one answer."""
    match given.command:
        case "plan":
            await mover.planned()
        case "rebalance":
            await mover.rebalance()
        case "move":
            await mover.move(given.first, given.last, given.to)
        case "drain":
            await mover.drain(given.shard)
        case "resume":
            await mover.resume(given.move, given.rollback_window)
        case "recover":
            await (mover.recover() if given.every is None else mover.keep_recovering(given.every))
        case "rollback":
            await mover.roll_back(given.move, target_lost=given.target_lost)
        case "rebuild":
            key = None if given.token_key_file is None else await asyncio.to_thread(given.token_key_file.read_bytes)
            return {"epoch": await rebuild.rebuild(settings, given.shard, given.replica, key)}
        case _:
            return await _answer(mover, given)
    return {}


async def _answer(mover: Mover, given: argparse.Namespace) -> dict[str, Any]:
    match given.command:
        case "list":
            return {"moves": [as_document(move) for move in await mover.moves()]}
        case "add":
            replicas = tuple(Replica(name, address) for name, address in given.replica)
            return {"epoch": await mover.add(Shard(given.shard, given.address, given.weight, replicas=replicas))}
        case "set":
            return {"epoch": await mover.set(given.shard, given.status and ShardStatus(given.status), given.weight)}
        case "remove":
            return {"epoch": await mover.remove(given.shard)}
    slot = await _slot(mover, given)
    await mover.pin(slot, given.shard if given.command == "pin" else None)
    return {"slot": slot}


async def _slot(mover: Mover, given: argparse.Namespace) -> int:
    if given.user is not None:
        if await mover.placement() is not PlacementStrategy.USER_BASED:
            raise CatalogError("users have no slot of their own in this cluster: its placement is not by user")
        return slot_of(given.user.encode())
    if not 0 <= given.slot < SLOT_COUNT:
        raise CatalogError(f"slots are 0 to {SLOT_COUNT - 1}")
    return int(given.slot)


def as_document(move: Move) -> dict[str, Any]:
    """A move as it is told."""
    return {
        "move_id": move.move_id,
        "first": move.first,
        "last": move.last,
        "source": move.source,
        "target": move.target,
        "step": move.step.value,
        "attempts": move.attempts,
        "rows": move.rows,
        "error": move.error,
        "cutover_at": move.cutover_at.isoformat() if move.cutover_at else None,
        "rollback_window_s": move.rollback_window_s,
        "rollback_until": move.rollback_until.isoformat() if move.rollback_until else None,
    }


def _tell(event: dict[str, Any]) -> None:
    try:
        print(json.dumps(event), flush=True)
    except BrokenPipeError:
        # Whoever listened has gone; the work has not.
        sys.stdout = open("/dev/null", "w", encoding="utf-8")  # noqa: SIM115  # For as long as the process lasts.


def _interval(text: str) -> float:
    seconds = float(text)
    if not 0.1 <= seconds <= 3600:
        raise argparse.ArgumentTypeError("must be 0.1 to 3600")
    return seconds


def _window(text: str) -> float:
    seconds = float(text)
    if not 0 <= seconds <= MAX_ROLLBACK_WINDOW_S:
        raise argparse.ArgumentTypeError(f"must be 0 to {MAX_ROLLBACK_WINDOW_S}")
    return seconds


def _named_address(text: str) -> tuple[str, str]:
    name, separator, address = text.partition("=")
    if not (name and separator and address.rpartition(":")[0]):
        raise argparse.ArgumentTypeError("must be ID=HOST:PORT")
    return name, address


def run() -> int:
    """Entry point."""
    arguments = arguments_of(sys.argv[1:])
    try:
        settings = config.load(MoverSettings, arguments.config)
    except ConfigError as error:
        print(f"mover: {error}", file=sys.stderr)
        return 1
    logs.configure("mover", settings.log_format, settings.log_level, stream=sys.stderr)
    return uvloop.run(main(settings, arguments))


if __name__ == "__main__":
    sys.exit(run())
