"""The commands about shards and moves as an operator gives them: what they tell, how they end, and what they refuse.

Whatever is done, everything that was ever stored is found after it, by its id, in its user's list and by search.
"""

import json
import signal
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pytest
import pytest_asyncio

from common.moves import Move, Step
from memshard import AsyncMemoryClient, MemshardError, NewMemory, ReadOnly, Unavailable
from tests.support.cluster import LocalCluster, at_work, command
from tests.support.eventually import eventually
from tests.support.moving import Slots
from tests.support.wire import database, user_slot

# Commands start a process each, and slots are moved in nearly every test.
pytestmark = pytest.mark.timeout(240)

_USERS = [f"kept-{number}" for number in range(40)]
_DIMENSIONS = 16
_ALL = [1.0] * _DIMENSIONS
# Longer than any test: what is to be brought back must not be cleaned up before.
_HELD = ("--rollback-window", "600")
_AT_ONCE = ("--rollback-window", "0")
# No shard is taken out of the catalog.
_KEEP_SHARDS = """
CREATE FUNCTION keep_shards() RETURNS trigger LANGUAGE plpgsql AS $body$
BEGIN
    RAISE EXCEPTION 'kept by a test';
END
$body$;
CREATE TRIGGER keep_shards BEFORE DELETE ON shards FOR EACH ROW EXECUTE FUNCTION keep_shards();
"""
_LET_SHARDS_GO = "DROP TRIGGER keep_shards ON shards; DROP FUNCTION keep_shards()"


@dataclass
class Kept:
    """A cluster, and all that was stored in it: user and content by id."""

    cluster: LocalCluster
    slots: Slots
    memories: dict[str, tuple[str, str]] = field(default_factory=dict)

    async def store(self, *contents: str, users: Sequence[str] = _USERS) -> None:
        """One memory more with each content for each of the users."""
        new = [
            NewMemory(user_id=user, content=content, embedding=[*_ALL[:-1], number / 10])
            for user in users
            for number, content in enumerate(contents)
        ]
        async with AsyncMemoryClient(self.cluster.address) as client:
            result = await client.store_many(new)
        for memory, outcome in zip(new, result.outcomes, strict=True):
            assert outcome.error is None, outcome.error
            self.memories[outcome.id] = (memory.user_id, memory.content)

    async def found(self) -> None:
        """AssertionError unless everything is there, whichever way it is looked for, and nothing else."""
        async with AsyncMemoryClient(self.cluster.address) as client:
            listed: dict[str, tuple[str, str]] = {}
            searched: dict[str, tuple[str, str]] = {}
            fetched: dict[str, tuple[str, str]] = {}
            for user in _USERS:
                page = await client.list_memories(user, page_size=1000)
                listed |= {memory.id: (memory.user_id, memory.content) for memory in page.memories}
                result = await client.search(user_id=user, embedding=_ALL, limit=1000)
                searched |= {found.memory.id: (user, found.memory.content) for found in result.results}
            for memory_id in self.memories:
                memory = await client.get(memory_id)
                fetched[memory_id] = (memory.user_id, memory.content)
            everywhere = await client.search(embedding=_ALL, limit=1000, require_all_shards=True)
        assert listed == self.memories
        assert searched == self.memories
        assert fetched == self.memories
        assert {found.memory.id for found in everywhere.results} == self.memories.keys()

    async def run(self, *arguments: str) -> str:
        """A command that must succeed; what it printed."""
        return await self.cluster.run(*arguments)

    async def lines(self, *arguments: str) -> list[dict[str, Any]]:
        """The same with --json; each line of it parsed."""
        return [json.loads(line) for line in (await self.run(*arguments, "--json")).splitlines()]

    async def refused(self, *arguments: str) -> tuple[int, str]:
        """A command that must fail, with a line for people; its exit code and what it printed."""
        code, output = await command(*arguments, "--data-dir", str(self.cluster.data_dir))
        assert code != 0, output
        assert "Traceback" not in output
        return code, output

    async def known(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """The shards and all moves, as the commands tell them."""
        shards = json.loads(await self.run("shards", "list", "--json"))
        moves = json.loads(await self.run("moves", "list", "--all", "--json"))
        return shards["shards"], moves["moves"]

    async def counts(self) -> list[int]:
        """How many slots each shard has."""
        return [shard["slots"] for shard in (await self.known())[0]]

    async def weigh(self, weight: int) -> None:
        """Gives shard-1 another weight."""
        (said,) = await self.lines("shards", "set", "shard-1", "--weight", str(weight))
        assert said["shard_id"] == "shard-1"
        assert said["epoch"] == (await self.slots.topology()).epoch

    async def balanced(self) -> None:
        """Back to where every test begins: two shards with half of the slots each."""
        await self.weigh(1)
        await self.run("rebalance", *_AT_ONCE)
        assert await self.counts() == [8192, 8192]

    async def begun(self, step: Step | None = None) -> list[Move]:
        """The open moves, once there are some; with a step, once all of four are there."""

        async def moves() -> list[Move]:
            found = [move for move in await self.slots.moves() if not move.step.is_final]
            return found if step is None or [move.step for move in found] == [step] * 4 else []

        return await eventually(moves, within_s=60)

    async def user_of(self, shard_id: str) -> str:
        """A user that a shard has."""
        topology = await self.slots.topology()
        return next(user for user in _USERS if topology.owner(user_slot(user)).shard_id == shard_id)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def kept() -> AsyncIterator[Kept]:
    async with LocalCluster(shards=2, embedder="none", dimensions=_DIMENSIONS) as cluster:
        kept = Kept(cluster, Slots(cluster, {}))
        await kept.store("green tea", "black tea", "no tea")
        yield kept


@pytest_asyncio.fixture(autouse=True)
async def nothing_is_lost(kept: Kept) -> AsyncIterator[None]:
    """By any of it, and nothing is left behind either."""
    yield
    await kept.found()
    assert await kept.slots.left_over() == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("shards", "remove", "shard-9"), "there is no shard 'shard-9', only shard-0, shard-1"),
        (("shards", "remove", "shard-1"), "shard-1 has 8192 slots; `memshard shards drain shard-1` moves them"),
        (("shards", "remove", "../postgres"), "there is no shard '../postgres'"),
        (("shards", "drain", "shard-9"), "there is no shard 'shard-9', only shard-0, shard-1"),
        (("shards", "set", "shard-9", "--weight", "2"), "there is no shard 'shard-9', only shard-0, shard-1"),
        (("shards", "pin", "--user", "kept-0", "--shard", "shard-9"), "there is no shard 'shard-9'"),
        (("moves", "resume", "999"), "there is no move 999"),
        (("moves", "rollback", "999"), "there is no move 999"),
        (("catalog", "rebuild"), "runs"),
    ],
)
async def test_what_cannot_be_done_is_refused_and_changes_nothing(
    kept: Kept, arguments: tuple[str, ...], said: str
) -> None:
    before = await kept.slots.topology(), await kept.slots.moves()
    code, output = await kept.refused(*arguments)
    assert (code, said in output) == (1, True), output
    assert (await kept.slots.topology(), await kept.slots.moves()) == before


async def test_a_plan_says_what_would_be_moved_and_moves_nothing(kept: Kept) -> None:
    await kept.weigh(3)
    before = await kept.known()
    told = await kept.run("rebalance", "--plan", "--max-rate", "1")
    assert "4,096 slots are to be moved, in 4 ranges" in told
    assert "from shard-0 to shard-1" in told
    assert "in 16 ranges" in await kept.run("rebalance", "--plan", "--max-slots", "256")
    (line,) = await kept.lines("rebalance", "--plan")
    assert line["plan"]["slots"] == 4096
    assert {(move["source"], move["target"]) for move in line["plan"]["moves"]} == {("shard-0", "shard-1")}
    assert sum(move["last_slot"] - move["first_slot"] + 1 for move in line["plan"]["moves"]) == 4096
    assert await kept.known() == before
    await kept.weigh(1)
    assert await kept.lines("rebalance", "--plan") == [{"plan": {"slots": 0, "moves": []}}]
    assert "nothing is to be moved" in await kept.run("rebalance", "--plan")


async def test_a_rate_bounds_what_goes_over_in_a_second(kept: Kept) -> None:
    rate = 2
    await kept.weigh(3)
    known = {move.move_id for move in await kept.slots.moves()}
    await kept.lines("rebalance", "--max-rate", str(rate), *_AT_ONCE)
    assert await kept.counts() == [4096, 12288]
    moves = [move for move in await kept.slots.moves() if move.move_id not in known]
    # Two are under way at once, and the last waits for the rows of all that have ended before: two at least.
    cut_over = [move.cutover_at or datetime.min.replace(tzinfo=UTC) for move in moves]
    least_s = sum(sorted(move.rows for move in moves)[:2]) / rate
    assert least_s >= 3
    # The pace counts from when the rows were there, after which the first may have waited for the machine.
    assert (max(cut_over) - min(cut_over)).total_seconds() >= least_s - 1
    await kept.balanced()


async def test_a_rebalance_that_was_interrupted_is_rolled_back(kept: Kept) -> None:
    await kept.weigh(3)
    async with at_work("rebalance", *_HELD, "--data-dir", str(kept.cluster.data_dir)) as rebalance:
        moves = await kept.begun(Step.ACTIVE)
        rebalance.send_signal(signal.SIGINT)
        output, _ = await rebalance.communicate()
    assert (rebalance.returncode, "`memshard moves resume` goes on" in output.decode()) == (130, True)
    assert await kept.counts() == [4096, 12288]
    # What is written meanwhile comes back too.
    await kept.store("rooibos")
    code, output_of_remove = await kept.refused("shards", "remove", "shard-0")
    assert (code, "drain" in output_of_remove) == (1, True)
    listed = json.loads(await kept.run("moves", "list", "--json"))["moves"]
    assert [(int(move["move_id"]), move["step"]) for move in listed] == [(m.move_id, "active") for m in moves]
    for move in moves[1:]:
        assert _last_step(await kept.lines("moves", "rollback", str(move.move_id))) == "rolled_back"
    first = str(moves[0].move_id)
    assert "rolled back" in await kept.run("moves", "rollback", first)
    assert await kept.run("moves", "rollback", first) == "It has been rolled back already.\n"
    assert await kept.run("moves", "list") == "No move is open.\n"
    assert await kept.run("moves", "resume") == "There is nothing to resume.\n"
    assert await kept.counts() == [8192, 8192]
    await kept.balanced()


async def test_a_rebalance_does_not_move_again_what_was_rolled_back(kept: Kept) -> None:
    await kept.weigh(3)
    async with at_work("rebalance", *_HELD, "--data-dir", str(kept.cluster.data_dir)) as rebalance:
        moves = await kept.begun(Step.ACTIVE)
        await kept.run("moves", "rollback", str(moves[0].move_id))
        async with database(kept.cluster.catalog_dsn(owner=True)) as connection:
            # Their time to be brought back is over.
            await connection.execute(
                "UPDATE moves SET rollback_window_s = 0, version = version + 1 WHERE step = 'active'"
            )
        output, _ = await rebalance.communicate()
    assert rebalance.returncode == 1
    assert f"move {moves[0].move_id} was rolled back" in output.decode()
    after = {move.move_id: move.step for move in await kept.slots.moves()}
    assert [after[move.move_id] for move in moves] == [Step.ROLLED_BACK, Step.DONE, Step.DONE, Step.DONE]
    assert max(after) == moves[-1].move_id
    assert await kept.counts() == [8192 - 3072, 8192 + 3072]
    code, late = await kept.refused("moves", "rollback", str(moves[-1].move_id))
    assert (code, "way back is closed" in late) == (1, True)
    await kept.balanced()


async def test_a_pinned_user_is_taken_where_he_belongs_by_a_move_that_was_interrupted(kept: Kept) -> None:
    user = await kept.user_of("shard-0")
    (said,) = await kept.lines("shards", "pin", "--user", user, "--shard", "shard-1")
    assert said == {"slot": user_slot(user), "shard_id": "shard-1"}
    (planned,) = await kept.lines("rebalance", "--plan")
    (planned_move,) = planned["plan"]["moves"]
    assert (planned_move["first_slot"], planned_move["last_slot"]) == (user_slot(user), user_slot(user))
    async with at_work("rebalance", *_HELD, "--data-dir", str(kept.cluster.data_dir)) as rebalance:
        (move,) = await kept.begun()
        rebalance.send_signal(signal.SIGINT)
        await rebalance.communicate()
    assert rebalance.returncode == 130
    await kept.found()

    async def is_healthy() -> bool:
        document = json.loads(await kept.run("recover", "--test-after", "--json"))
        return [router["after"]["overall"] for router in document["routers"]] == ["healthy"]

    # Routers can do nothing about it, and lose nothing by trying.
    await eventually(is_healthy, within_s=30)
    code, output = await kept.refused("shards", "remove", "shard-1")
    assert (code, "drain" in output) == (1, True)
    # What a way back of half a minute would take is too long for this test.
    assert _last_step(await kept.lines("moves", "resume", str(move.move_id), "--rollback-window", "0")) == "done"
    assert (await kept.slots.topology()).owner(user_slot(user)).shard_id == "shard-1"
    assert await kept.lines("rebalance", "--plan") == [{"plan": {"slots": 0, "moves": []}}]
    assert await kept.lines("shards", "unpin", "--user", user) == [{"slot": user_slot(user), "shard_id": ""}]
    await kept.balanced()


async def test_a_shard_comes_and_leaves_with_a_user_who_is_pinned_to_it(kept: Kept) -> None:
    told = await kept.lines("shards", "add")
    added = told[-1]["shard_id"]
    assert told[-1] == {"shard_id": added, "message": "", "done": True}
    user = await kept.user_of("shard-1")
    await kept.run("shards", "pin", "--user", user, "--shard", added)
    await kept.run("rebalance", *_AT_ONCE)
    topology = await kept.slots.topology()
    assert topology.owner(user_slot(user)).shard_id == added
    assert topology.slot_count(added) >= 5461
    await kept.found()
    assert _last_step(await kept.lines("shards", "drain", added, *_AT_ONCE)) == "done"
    await kept.found()
    assert (await kept.lines("shards", "remove", added))[-1]["done"]
    assert await kept.counts() == [8192, 8192]
    names = [process["name"] for process in (await kept.cluster.status())["processes"]]
    assert not any(added in name for name in names)
    assert not list(kept.cluster.layout.postgres.glob(f"postgres-{added}*"))
    # The supervisor that made the cluster has been at work until here: the next must find all that it has.
    await kept.cluster.down()
    await kept.cluster.up()
    await kept.found()
    code, output = await kept.refused("shards", "remove", added)
    assert (code, f"there is no shard '{added}'" in output) == (1, True)


async def test_a_removal_that_was_cut_off_leaves_a_cluster_that_can_be_balanced_and_is_finished(kept: Kept) -> None:
    """As when the catalog is lost at that moment: here it refuses."""
    added = (await kept.lines("shards", "add"))[-1]["shard_id"]
    async with database(kept.cluster.catalog_dsn(owner=True)) as catalog:
        await catalog.execute(_KEEP_SHARDS)
        code, output = await kept.refused("shards", "remove", added)
        assert (code, "kept by a test" in output) == (1, True)
        assert await kept.lines("rebalance", "--plan") == [{"plan": {"slots": 0, "moves": []}}]
        await kept.run("rebalance", *_AT_ONCE)
        await kept.found()
        await catalog.execute(_LET_SHARDS_GO)
    # And it may have got further than is known.
    await kept.slots.move("remove", "--shard", added)
    assert (await kept.lines("shards", "remove", added))[-1]["done"]
    names = [process["name"] for process in (await kept.cluster.status())["processes"]]
    assert not any(added in name for name in names)
    assert not list(kept.cluster.layout.postgres.glob(f"postgres-{added}*"))
    assert await kept.counts() == [8192, 8192]
    await kept.found()


async def test_a_shard_serves_what_its_status_says(kept: Kept) -> None:
    theirs, others = await kept.user_of("shard-1"), await kept.user_of("shard-0")
    await kept.run("shards", "set", "shard-1", "--status", "readonly")
    await eventually(lambda: _fails(kept, theirs, ReadOnly))
    await kept.store("while the other is read-only", users=[others])
    await kept.found()
    # Nobody could take its slots: it stays as it is.
    code, output = await kept.refused("shards", "drain", "shard-0")
    assert (code, "no shard is active that could take the slots" in output) == (1, True)
    statuses = [shard["status"] for shard in (await kept.known())[0]]
    assert statuses == ["active", "readonly"]
    await kept.run("shards", "set", "shard-1", "--status", "maintenance")
    await eventually(lambda: _fails(kept, theirs, Unavailable))
    await kept.store("while the other is in maintenance", users=[others])
    assert await kept.lines("rebalance", "--plan") == [{"plan": {"slots": 0, "moves": []}}]
    await kept.run("shards", "set", "shard-1", "--status", "active")
    await eventually(lambda: _stores(kept, theirs))


async def test_a_catalog_that_is_damaged_is_made_again(kept: Kept) -> None:
    """As docs/runbooks/bring-back-a-lost-catalog.md says."""
    cluster = kept.cluster
    before = await kept.slots.topology()
    await cluster.down()
    catalog = cluster.plan().catalog_server().pgdata
    (catalog / "global" / "pg_control").unlink()
    code, output = await kept.refused("up", "--detach", "--port", str(cluster.port))
    assert (code, "postgres-catalog did not start" in output) == (1, True)
    told = await kept.run("catalog", "rebuild")
    for said in ("The catalog is made again", f"{catalog}.lost", "postgres-shard-1 is the primary of shard-1"):
        assert said in told
    assert (catalog.with_name(catalog.name + ".lost") / "PG_VERSION").exists()
    code, output = await kept.refused("catalog", "rebuild")
    assert (code, "from an earlier attempt; move it away first" in output) == (1, True)
    await cluster.up()
    after = await kept.slots.topology()
    assert after.ranges == before.ranges
    assert after.epoch > before.epoch
    await kept.found()
    await kept.store("after all")
    await kept.found()
    # It moves slots like any other.
    await kept.weigh(2)
    await kept.run("rebalance", *_AT_ONCE)
    assert sorted(await kept.counts()) in ([5461, 10923], [5462, 10922])


def _last_step(lines: list[dict[str, Any]]) -> str:
    """The step that a move was told to be at last."""
    return [str(line["state"]["move"]["step"]) for line in lines if "state" in line][-1]


async def _fails(kept: Kept, user: str, error: type[MemshardError]) -> bool:
    """Whether a user's store is refused with this error."""
    async with AsyncMemoryClient(kept.cluster.address) as client:
        try:
            stored = await client.store(user, "not refused yet", embedding=_ALL)
        except error:
            return True
    kept.memories[stored.memory.id] = (user, "not refused yet")
    return False


async def _stores(kept: Kept, user: str) -> bool:
    await kept.store("served again", users=[user])
    return True
