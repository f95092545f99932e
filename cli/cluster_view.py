"""What the cluster commands show: the progress of a start, what to do next, the table of what runs."""

import os
import shlex
import shutil
import sys
from pathlib import Path

from rich.table import Table
from rich.text import Text

from cli.options import DEFAULT_ADDRESS
from cli.terminal import console
from local.state import AUTO
from local.status import ClusterStatus, ReplicaStatus
from local.up import Ready

_SAMPLE = "Alice drinks green tea, never coffee"
_QUESTION = "what does Alice drink?"


class Terminal:
    """Follows an `up`, for the person at the terminal."""

    def __init__(self, root: Path, *, detached: bool) -> None:
        self._console = console()
        self._root = root
        self._detached = detached
        self.was_ready = False

    def starting(self) -> None:
        """Something is about to happen."""
        self._print(f"Starting the cluster in {self._root}")

    def progress(self, name: str) -> None:
        """The process or step `name` is ready."""
        self._print(f"  {name} ready")

    def ready(self, ready: Ready) -> None:
        """The cluster is ready: where it is, and what to do with it."""
        self.was_ready = True
        self._print(f"\nmemshard is ready in {ready.seconds:.1f} s", style="bold")
        self._print(f"  address   {', '.join(ready.addresses)}")
        self._print(f"  data      {ready.data_dir}")
        self._print(f"  logs      {ready.log_dir}")
        self._print("\nTry it:")
        for line in first_commands(ready):
            self._print(f"  {line}")
        if self._detached:
            self._print(f"\nIt runs until `{_command('down', self._root)}`.")
        else:
            self._print("\nCtrl-C stops it.")

    def stopping(self) -> None:
        """The end has begun."""
        self._print("\nStopping: calls in flight are finished first")

    def stopped(self) -> None:
        """Everything has ended."""
        self._print("Stopped." if self.was_ready else "Stopped before it was ready.")

    def _print(self, text: str, style: str | None = None) -> None:
        self._console.print(Text(text, style=style or ""), soft_wrap=True)


def first_commands(ready: Ready) -> list[str]:
    """Lines to paste that store a first memory and find it."""
    address = ready.addresses[0]
    to = "" if address.rpartition(":")[2] == DEFAULT_ADDRESS.rpartition(":")[2] else f" --address {address}"
    if ready.embedder == "none":
        memory = f'{{"user_id": "alice", "content": "{_SAMPLE}", "embedding": [0.1] * {ready.dimensions}}}'
        return [
            f"python3 -c 'import json; print(json.dumps({memory}))' | {program()} import -{to}",
            f"{program()} list --user alice{to}",
        ]
    return [f'{program()} add --user alice "{_SAMPLE}"{to}', f'{program()} search --user alice "{_QUESTION}"{to}']


def program() -> str:
    """How the person can call this program: by its name if the shell finds it, else by where it is."""
    here = Path(sys.argv[0])
    if here.name != "memshard" or shutil.which("memshard") == str(here.absolute()):
        return "memshard"
    absolute = here.absolute()
    relative = Path(os.path.relpath(absolute))
    return shlex.quote(str(relative if len(str(relative)) < len(str(absolute)) else absolute))


def show_status(status: ClusterStatus) -> None:
    """Tables of the processes and the shards."""
    out = console()
    if not status.processes:
        out.print(
            f"There is no cluster in {status.data_dir}; `{_command('up', Path(status.data_dir))}` makes one.",
            soft_wrap=True,
        )
        return
    processes = Table("process", "role", "pid", "port", "health", box=None, pad_edge=False)
    for process in status.processes:
        health = "healthy" if process.healthy else "not running" if process.pid is None else "unhealthy"
        processes.add_row(
            process.name,
            process.role,
            str(process.pid or "-"),
            str(process.port or "-"),
            Text(health, style="green" if process.healthy else "red"),
        )
    out.print(processes)
    if status.shards:
        shards = Table("shard", "status", "level", "slots", "primary", "writes", "replicas", box=None, pad_edge=False)
        for shard in status.shards:
            shards.add_row(
                shard.shard_id,
                shard.status,
                _level(shard.level),
                str(shard.slots),
                shard.primary or Text("none", style="red"),
                shard.durability or "-",
                "\n".join(map(_replica, shard.replication)) or "-",
            )
        out.print()
        out.print(shards)
    epoch = f"epoch {status.epoch}" if status.epoch is not None else "epoch unknown"
    silent = {"live": "", "last known": ", the last known; the catalog does not answer"}.get(status.catalog, "")
    out.print(f"\n{epoch}{silent}\ndata in {status.data_dir}", soft_wrap=True)
    if status.level != AUTO:
        out.print(f"The degradation level of the cluster was set to {status.level}.", style="yellow")
    if not status.runs():
        out.print(f"Nothing runs; `{_command('up', Path(status.data_dir))}` starts it.", soft_wrap=True)
    elif any(process.role == "supervisor" and process.pid is None for process in status.processes):
        again = _command("up", Path(status.data_dir))
        out.print(f"Nobody looks after what runs; `{again}` ends it and starts anew.", soft_wrap=True)


def _level(level: str) -> Text:
    """The degradation level that an operator has set."""
    return Text(level, style="" if level == AUTO else "yellow")


def _replica(replica: ReplicaStatus) -> str:
    """A replica's number, and how far it is behind."""
    number = replica.name.rpartition("-")[2]
    if replica.lag_ms is None:
        return f"{number}: no answer"
    return f"{number}: {replica.lag_ms / 1000:.1f} s behind"


def _command(name: str, root: Path) -> str:
    return f"{program()} {name} --data-dir {shlex.quote(str(root))}"
