"""Moving slots in a cluster of a test's own: the mover as a process, and what it leaves in the databases."""

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from common import catalog, catalog_moves
from common.moves import Move, Step
from common.postgres import Connection
from common.topology import Topology
from local import mover
from local.postgres import SUPERUSER
from shard.moving.tables import MARKS, MOVED
from tests.support.cluster import LocalCluster
from tests.support.eventually import eventually
from tests.support.wire import database

_LINE_BYTES = 1024 * 1024

_LEFT = """
SELECT 'slot ' || slot_name AS what FROM pg_replication_slots WHERE slot_type = 'logical'
UNION ALL SELECT 'subscription ' || subname FROM pg_subscription
UNION ALL SELECT 'publication ' || pubname FROM pg_publication
UNION ALL SELECT 'origin ' || roname FROM pg_replication_origin
"""
_HAS_LOGICAL_SLOTS = "SELECT EXISTS (SELECT FROM pg_replication_slots WHERE slot_type = 'logical')"
_UNOWNED = """
SELECT count(*) FROM {table}
WHERE NOT EXISTS (SELECT FROM owned_slots WHERE owned_slots.slot = {table}.slot AND state = 'own')
"""
# Keeps a fence from being made for as long as the transaction lasts, and has nothing else wait for it.
_HOLD_OFF = "LOCK TABLE owned_slots IN ROW SHARE MODE"
_IS_HELD_OFF = "SELECT EXISTS (SELECT FROM pg_locks WHERE relation = 'owned_slots'::regclass AND NOT granted)"
# Keeps what is replicated from coming in, as each hand-over's mark is part of it. Whoever looks for the mark may.
_HOLD_MARKS = f"LOCK TABLE {MARKS} IN EXCLUSIVE MODE"
_FENCED = "SELECT count(*) FROM owned_slots WHERE state = 'fenced'"
# Whoever records that a move leaves a step waits for whoever has the lock of that step, and so the move stays in it.
_STEP_CLASS = 0x73746570  # "step"
_HOLD_STEPS = f"""
CREATE OR REPLACE FUNCTION hold_step() RETURNS trigger LANGUAGE plpgsql AS $body$
BEGIN
    IF NEW.step <> OLD.step THEN
        PERFORM pg_advisory_xact_lock_shared({_STEP_CLASS}, hashtext(OLD.step));
    END IF;
    RETURN NEW;
END
$body$;
CREATE OR REPLACE TRIGGER hold_step BEFORE UPDATE ON moves FOR EACH ROW EXECUTE FUNCTION hold_step();
"""
_TAKE_STEP = f"SELECT pg_advisory_lock({_STEP_CLASS}, hashtext($1))"
_LEAVE_STEPS = "SELECT pg_advisory_unlock_all()"
_HELD_BACK = f"FROM pg_locks WHERE locktype = 'advisory' AND classid = {_STEP_CLASS} AND NOT granted"
_IS_HELD_BACK = f"SELECT EXISTS (SELECT {_HELD_BACK})"
_IS_LONG_HELD_BACK = f"""
SELECT EXISTS (
    SELECT FROM pg_stat_activity WHERE pid IN (SELECT pid {_HELD_BACK})
        AND query_start < now() - make_interval(secs => $1)
)
"""
_END_HELD_BACK = f"SELECT pg_terminate_backend(pid, 5000) {_HELD_BACK}"
# Changed only when a shard is really told of a hand-over. Who waits to do it has other locks, until it ends.
_HOLD_IDENTITY = "SELECT FROM identity FOR UPDATE"
_TELLER = "SELECT pid FROM pg_locks WHERE NOT granted AND pg_backend_pid() = ANY (pg_blocking_pids(pid)) LIMIT 1"
_LIVES = "SELECT EXISTS (SELECT FROM pg_locks WHERE pid = $1)"


@dataclass
class Slots:
    """The slots of a cluster, and movers for them."""

    cluster: LocalCluster
    settings: Mapping[str, Any]

    @asynccontextmanager
    async def mover(self, *arguments: str) -> AsyncIterator["MoverProcess"]:
        """A mover at work; killed at the end if it still is."""
        file = Path(self.cluster.data_dir) / "config" / "mover-test.yaml"
        file.write_text(yaml.safe_dump(mover.settings(self.cluster.plan(), **self.settings)))
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "shard.mover", "--config", str(file), *arguments),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=_LINE_BYTES,
        )
        try:
            yield MoverProcess(process)
        finally:
            if process.returncode is None:
                process.kill()
            _, errors = await process.communicate()
            sys.stderr.write(errors.decode(errors="replace"))

    @asynccontextmanager
    async def fence_held(
        self, running: "MoverProcess", giver: str, taker: str, step: Step = Step.FENCED
    ) -> AsyncIterator[None]:
        """From the moment that a mover at work has really fenced its slots on the shard that gives them up, on the way
        there or, when it is `returning`, on the way back; until the end it gets no further.

        It is kept from fencing until nothing else is left to be done before, and the taker then from taking the mark.
        Either shard's server may be gone by the end.
        """
        async with self._stopped_at_the_fence(running, giver, taker, step, _HOLD_MARKS) as (fencing, _):
            await eventually(lambda: fencing.fetchval(_FENCED))
            yield

    @asynccontextmanager
    async def step_held(self, step: Step) -> AsyncIterator["HeldStep"]:
        """No move leaves the step, whoever drives it, until the end or until it is released."""
        plan = self.cluster.plan()
        async with database(plan.catalog_server().dsn(SUPERUSER, plan.secrets.postgres)) as connection:
            await connection.execute(_HOLD_STEPS)
            await connection.execute(_TAKE_STEP, step.value)
            yield HeldStep(connection)

    @asynccontextmanager
    async def untold(
        self, running: "MoverProcess", giver: str, shard_id: str, step: Step = Step.FENCED
    ) -> AsyncIterator["Untold"]:
        """From the moment that a mover at work is about to fence, as in `fence_held`, nobody can tell the shard of a
        hand-over: that it has given slots up, or is to take writes.

        Not before: whoever makes a replication slot waits for every transaction that has written or locked a row.
        """
        async with self._stopped_at_the_fence(running, giver, shard_id, step, _HOLD_IDENTITY) as (_, connection):
            yield Untold(connection)

    @asynccontextmanager
    async def _stopped_at_the_fence(
        self, running: "MoverProcess", giver: str, shard_id: str, step: Step, hold: str
    ) -> AsyncIterator[tuple[Connection, Connection]]:
        """A mover at work is kept from fencing until the shard is held as `hold` says; connections to the giver and to
        the shard, both gone by the end.
        """
        async with (
            database(self.cluster.shard_dsn(giver, owner=True)) as fencing,
            database(self.cluster.shard_dsn(shard_id, owner=True)) as connection,
        ):
            async with fencing.transaction():
                await fencing.execute(_HOLD_OFF)
                await running.until(step)
                await eventually(lambda: fencing.fetchval(_IS_HELD_OFF))
                await connection.execute("BEGIN")
                await connection.execute(hold)
            try:
                yield fencing, connection
            finally:
                fencing.terminate()
                connection.terminate()

    async def standbys_are_free(self) -> bool:
        """Whether no server that follows another has a replication slot of a move, as from when it was a primary."""
        plan = self.cluster.plan()
        for shard_id in plan.record.shard_ids():
            for name in self.cluster.standbys(shard_id):
                server = plan.shard_servers(shard_id)[name]
                async with database(server.dsn(SUPERUSER, plan.secrets.postgres)) as connection:
                    if await connection.fetchval(_HAS_LOGICAL_SLOTS):
                        return False
        return True

    async def fenced(self, shard_id: str) -> int:
        """How many slots of a shard take no writes."""
        async with database(self.cluster.shard_dsn(shard_id)) as connection:
            count: int = await connection.fetchval(_FENCED)
            return count

    async def move(self, *arguments: str) -> list[dict[str, Any]]:
        """Runs a mover to its end, which must be a good one; what it told."""
        async with self.mover(*arguments) as running:
            events = [event async for event in running.events()]
            assert events, await running.failure()
            assert events[-1]["event"] == "done", events[-3:]
        return events

    async def moves(self) -> list[Move]:
        async with database(self.cluster.catalog_dsn()) as connection:
            return await catalog_moves.read_moves(connection)

    async def topology(self) -> Topology:
        async with database(self.cluster.catalog_dsn()) as connection:
            return await catalog.read_topology(connection)

    async def left_over(self, *shard_ids: str) -> list[str]:
        """What moves have left behind in these shards, or in any: streams, rows of slots of others, fences."""
        found = []
        for shard_id in shard_ids or self.cluster.plan().record.shard_ids():
            async with database(self.cluster.shard_dsn(shard_id, owner=True)) as connection:
                found += [f"{shard_id}: {row['what']}" for row in await connection.fetch(_LEFT)]
                for table in MOVED:
                    if count := await connection.fetchval(_UNOWNED.format(table=table)):
                        found.append(f"{shard_id}: {count} rows of {table} in slots of others")
                if count := await connection.fetchval(_FENCED):
                    found.append(f"{shard_id}: {count} slots are fenced")
        return found

    async def rows(self) -> dict[str, dict[str, set[tuple[Any, ...]]]]:
        """Every row of every table that moves, as text, by shard."""
        found: dict[str, dict[str, set[tuple[Any, ...]]]] = {}
        for shard_id in self.cluster.plan().record.shard_ids():
            async with database(self.cluster.shard_dsn(shard_id, owner=True)) as connection:
                found[shard_id] = {
                    table: {tuple(row) for row in await connection.fetch(f"SELECT {table}::text FROM {table}")}
                    for table in MOVED
                }
        return found


@dataclass
class HeldStep:
    """A step that moves are kept in."""

    _connection: Connection

    async def is_done(self) -> None:
        """Returns when somebody has done all that is to be done in it, and wants to record what comes next."""
        await eventually(lambda: self._connection.fetchval(_IS_HELD_BACK), within_s=30)

    async def is_waited_for(self, seconds: float) -> None:
        """Returns when somebody has waited for so long, with one statement, to record what comes next."""
        await eventually(lambda: self._connection.fetchval(_IS_LONG_HELD_BACK, seconds), within_s=30)

    async def end_sessions(self) -> None:
        """Ends who is held back, as the catalog does when it finds that a process is gone: nothing is recorded."""
        await self._connection.execute(_END_HELD_BACK)

    async def release(self) -> None:
        """From now on it can be left."""
        await self._connection.execute(_LEAVE_STEPS)


@dataclass
class Untold:
    """A shard that is not told of a hand-over."""

    _connection: Connection

    async def teller(self) -> int:
        """Returns when somebody is about to tell it: the process in the server that waits for it."""
        pid: int = await eventually(lambda: self._connection.fetchval(_TELLER), within_s=30)
        return pid

    async def is_gone(self, pid: int) -> None:
        """Returns when that process has ended, and so will tell nothing any more."""

        async def ended() -> bool:
            return not await self._connection.fetchval(_LIVES, pid)

        await eventually(ended)


@dataclass
class MoverProcess:
    """A mover at work."""

    process: asyncio.subprocess.Process

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """What it tells, until it ends."""
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            yield json.loads(line)

    async def until(self, step: str) -> dict[str, Any]:
        """Returns when a move is at a step. AssertionError: it ended before."""
        async for event in self.events():
            if event.get("step") == step:
                return event
            assert event["event"] != "failed", event
        raise AssertionError(f"it ended before {step}")

    async def until_event(self, kind: str) -> dict[str, Any]:
        """Returns when it tells of something of a kind. AssertionError: it ended before."""
        async for event in self.events():
            if event["event"] == kind:
                return event
            assert event["event"] != "failed", event
        raise AssertionError(f"it ended before it told of {kind}")

    async def logged(self, text: str) -> None:
        """Returns once it has logged something. AssertionError: it ended before."""
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            if text in line.decode():
                return
        raise AssertionError(f"it ended before it logged {text!r}")

    async def failure(self) -> str:
        assert self.process.stderr is not None
        return (await self.process.stderr.read()).decode()

    def send(self, number: int = signal.SIGKILL) -> None:
        self.process.send_signal(number)
