"""A rolling restart of every process under load: no call fails, and nothing acknowledged is lost or doubled."""

import asyncio
import json
import time
from collections.abc import Sequence

import pytest

from memshard import Durability
from tests.faults.conftest import Record
from tests.support.cluster import LocalCluster, command
from tests.support.eventually import eventually
from tests.support.load import Load

_RESTART_TIMEOUT_S = 280.0


async def restarted(cluster: LocalCluster, names: Sequence[str]) -> list[str]:
    """`memshard restart`, which must succeed; the processes in the order in which they were restarted."""
    output = await cluster.run("restart", *names, "--json", timeout_s=_RESTART_TIMEOUT_S)
    return [json.loads(line)["name"] for line in output.splitlines()]


async def quorum(cluster: LocalCluster) -> bool:
    """Whether all is well, and writes are acknowledged by a quorum everywhere."""
    status = await cluster.status()
    return all(p["healthy"] for p in status["processes"]) and all(
        shard["durability"] == "QUORUM" for shard in status["shards"]
    )


def pids(cluster: LocalCluster) -> dict[str, int]:
    """The pid of every process but the supervisor, from its state file."""
    processes = json.loads(cluster.layout.state.read_text())["processes"]
    return {process["name"]: process["pid"] for process in processes if process["role"] != "supervisor"}


async def rolling(rounds: int, readers: int) -> str:
    """Rounds of restarts of everything, under load; what was measured. Through one router, which is restarted too."""
    async with LocalCluster(shards=2, replicas=1, embedder="none", dimensions=3) as cluster:
        await eventually(lambda: quorum(cluster), within_s=60)
        load = Load(cluster.address, readers=readers)
        async with asyncio.TaskGroup() as group:
            group.create_task(load.run())
            try:
                await eventually(lambda: load.total() > 50)
                began = time.monotonic()
                for _ in range(rounds):
                    before = pids(cluster)
                    names = await restarted(cluster, ["--all"])
                    after = pids(cluster)
                    assert sorted(names) == sorted(before) == sorted(after)
                    assert not set(before.values()) & set(after.values())
                took_s = time.monotonic() - began
                gap_s = load.writes.longest_gap_s(began, time.monotonic())
                await eventually(lambda: quorum(cluster), within_s=60)
                marked = load.total()
                await eventually(lambda: load.total() > marked + 50)
            finally:
                load.stop()
        lost, doubled = await load.lost_and_doubled()
        share = load.durabilities[Durability.QUORUM] / load.total()
        measured = (
            f"{rounds * len(names)} restarts in {took_s:.0f} s; {load.total()} writes acknowledged, {share:.0%} of "
            f"them QUORUM, {lost} lost, {doubled} doubled, {len(load.failures)} calls failed; longest time without a "
            f"write {gap_s:.2f} s"
        )
        print(measured)
        assert (lost, doubled) == (0, 0)
        assert load.failures == []
        return measured


@pytest.mark.timeout(400)
async def test_no_call_fails_while_every_process_is_restarted_one_by_one() -> None:
    await rolling(rounds=1, readers=2)


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_no_call_fails_in_round_after_round_of_restarts(record: Record) -> None:
    measured = await rolling(rounds=3, readers=8)
    record("rolling restart of every process, one by one", "0 failed calls, 0 lost, 0 doubled", measured)


async def test_a_successor_that_cannot_start_leaves_the_old_process_serving() -> None:
    async with LocalCluster(shards=1, embedder="none", dimensions=3) as cluster:
        before = pids(cluster)
        file = cluster.layout.settings("shard-0")
        file.write_text(file.read_text() + "colour: blue\n")
        code, output = await command("restart", "shard-0", "--data-dir", str(cluster.data_dir))
        assert code == 1
        assert "a new shard-0 ended with exit code 1; the old one goes on" in output
        assert pids(cluster) == before
        assert await cluster.healthy()
        file.write_text(file.read_text().replace("colour: blue\n", ""))
        assert await restarted(cluster, ["shard-0"]) == ["shard-0"]
        assert pids(cluster)["shard-0"] != before["shard-0"]

        code, output = await command("restart", "shard-9", "--data-dir", str(cluster.data_dir))
        assert code == 1
        assert "there is no process shard-9, only " in output
