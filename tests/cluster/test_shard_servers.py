"""A shard's servers without its services: who is the primary after whatever may happen to them and their supervisor."""

import asyncio
import os
import random
import shutil
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress

import asyncpg
import psutil
import pytest

from common import catalog
from common.postgres import CONNECT_ERRORS
from local import leftovers, replication, standby
from local.appointment import RefusedError
from local.errors import LocalClusterError, StartError
from local.layout import Layout
from local.planned_failover import PlannedFailover, Progress, Step
from local.postgres import SUPERUSER, Server
from local.record import Options, Secrets, load_record, load_secrets
from local.sessions import as_owner
from local.shard_servers import ShardServers
from local.standby_settings import slot_name
from local.supervisor import MAX_EARLY_DEATHS
from tests.support.databases import fresh_layout, in_a_process, running, supervised
from tests.support.eventually import eventually
from tests.support.servers import SHARD, Servers

FIRST, SECOND, THIRD = "postgres-shard-0", "postgres-shard-0-1", "postgres-shard-0-2"


@asynccontextmanager
async def servers_of(layout: Layout, replicas: int = 1) -> AsyncIterator[Servers]:
    async with supervised_servers(layout, replicas) as (servers, _):
        yield servers


@asynccontextmanager
async def supervised_servers(layout: Layout, replicas: int = 1) -> AsyncIterator[tuple[Servers, ShardServers]]:
    async with supervised(layout, Options(shards=1, replicas=replicas)) as (plan, shards):
        servers = Servers(plan)
        await eventually(servers.primary, within_s=20)
        yield servers, shards[SHARD]


async def rows(servers: Servers, name: str) -> set[int]:
    return {row["x"] for row in await servers.execute(name, "SELECT x FROM t")}


async def test_when_the_primary_dies_a_member_of_the_sync_set_takes_over_and_the_old_one_follows() -> None:
    with fresh_layout() as layout:
        async with servers_of(layout) as servers:
            assert await servers.arm() == FIRST
            await servers.execute(FIRST, "CREATE TABLE t (x int)")
            await servers.execute(FIRST, "INSERT INTO t VALUES (1)")
            os.kill(servers.pid(FIRST), signal.SIGKILL)
            began = time.monotonic()
            await eventually(lambda: _writes(servers, SECOND), within_s=5)
            print(f"writes again after {time.monotonic() - began:.2f} s")
            assert await rows(servers, SECOND) == {1}
            recorded = await servers.sync_set()
            assert (recorded.primary, recorded.members) == (SECOND, frozenset())
            assert await eventually(servers.primary, within_s=20) == SECOND
            await servers.execute(SECOND, "INSERT INTO t VALUES (2)")
            await eventually(lambda: _has(servers, FIRST, {1, 2}))
        # And so it stays when everything is started again.
        async with servers_of(layout) as servers:
            assert await servers.primary() == SECOND
            assert await rows(servers, SECOND) == {1, 2}


async def test_without_a_sync_set_the_primary_is_started_again_where_it_was() -> None:
    with fresh_layout() as layout:
        async with servers_of(layout) as servers:
            await servers.execute(FIRST, "CREATE TABLE t (x int)")
            before = servers.pid(FIRST)
            os.kill(before, signal.SIGKILL)
            await eventually(lambda: servers.pid(FIRST) != before)
            assert await eventually(servers.primary, within_s=20) == FIRST
            assert (await servers.sync_set()).primary == FIRST


@pytest.mark.slow
async def test_what_a_backend_acknowledged_after_its_postmasters_death_is_not_lost() -> None:
    """A backend outlives its killed postmaster. What it still acknowledges has to be on the one that takes over."""
    with fresh_layout() as layout:
        async with servers_of(layout) as servers:
            await servers.arm()
            await servers.execute(FIRST, "CREATE TABLE t (x int)")
            acknowledged: set[int] = set()

            async def write(number: int) -> None:
                connection = await asyncpg.connect(servers[FIRST].dsn(SUPERUSER, servers.plan.secrets.postgres))
                try:
                    while True:
                        number += 8
                        await connection.execute("INSERT INTO t VALUES ($1)", number)
                        acknowledged.add(number)
                finally:
                    connection.terminate()

            writers = [asyncio.create_task(write(number)) for number in range(8)]
            await eventually(lambda: len(acknowledged) > 100)
            os.kill(servers.pid(FIRST), signal.SIGKILL)
            for ended in await asyncio.gather(*writers, return_exceptions=True):
                assert isinstance(ended, CONNECT_ERRORS)
            await eventually(lambda: _writes(servers, SECOND))
            assert acknowledged <= await rows(servers, SECOND)
            print(f"{len(acknowledged)} acknowledged, 0 lost")


@pytest.mark.slow
async def test_of_two_standbys_one_takes_over_and_the_other_follows_it_as_it_is() -> None:
    with fresh_layout() as layout:
        async with servers_of(layout, replicas=2) as servers:
            await servers.arm()
            third = servers.pid(THIRD)
            os.kill(servers.pid(FIRST), signal.SIGKILL)
            assert await eventually(servers.primary, within_s=20) == SECOND
            assert servers.pid(THIRD) == third
            # It had all that the new primary has, so that commits may wait for it from the start.
            assert (await servers.sync_set()).members == {THIRD}
            view = await eventually(lambda: _slots(servers, SECOND))
            assert view == {slot_name(FIRST), slot_name(THIRD)}


async def test_a_standby_that_is_no_member_never_takes_over() -> None:
    with fresh_layout() as layout:
        async with servers_of(layout) as servers:
            before = servers.pid(FIRST)
            # Commits wait for it, but the catalog does not say so: it was on its way in, or out.
            await replication.wait_for(servers[FIRST], servers.plan.secrets, [SECOND])
            os.kill(before, signal.SIGKILL)
            await eventually(lambda: servers.pid(FIRST) != before)
            assert await eventually(servers.primary, within_s=20) == FIRST


@pytest.mark.slow
async def test_a_standby_whose_directory_is_gone_is_made_anew() -> None:
    with fresh_layout() as layout:
        async with servers_of(layout) as servers:
            await servers.execute(FIRST, "CREATE TABLE t AS SELECT 7 AS x")
            os.kill(servers.pid(SECOND), signal.SIGKILL)
            # It may be being started again at this moment.
            shutil.rmtree(servers[SECOND].pgdata, ignore_errors=True)
            await eventually(lambda: _has(servers, SECOND, {7}), within_s=20)
            assert await eventually(servers.primary, within_s=20) == FIRST


@pytest.mark.slow
async def test_a_large_old_primary_is_rewound_to_where_it_parted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(standby, "REWIND_FROM_BYTES", 0)
    with fresh_layout() as layout:
        async with servers_of(layout) as servers:
            await servers.execute(FIRST, "CREATE TABLE t AS SELECT 7 AS x")
            await servers.arm()
            # What it alone has: the others get no more of its log, and it waits for nobody.
            os.kill(servers.pid(SECOND), signal.SIGSTOP)
            await servers.execute(FIRST, "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_replication")
            await servers.execute(FIRST, "INSERT INTO t VALUES (8)", waits=False)
            mark = (servers[FIRST].pgdata / "global").stat().st_ino
            os.kill(servers.pid(FIRST), signal.SIGKILL)
            os.kill(servers.pid(SECOND), signal.SIGCONT)
            assert await eventually(servers.primary, within_s=30) == SECOND
            # The old one follows once it has replayed as far as it was rewound from.
            assert await eventually(lambda: rows(servers, FIRST), within_s=30) == await rows(servers, SECOND) == {7}
            assert (servers[FIRST].pgdata / "global").stat().st_ino == mark  # It was not copied.
    assert "could not be rewound" not in caplog.text


@pytest.mark.slow
async def test_a_cluster_from_before_there_were_standbys_gets_what_it_lacks() -> None:
    with fresh_layout() as layout:
        async with running(layout) as plan:
            servers = Servers(plan)
            for statement in (
                "DROP ROLE memshard_replication",
                "REVOKE pg_monitor FROM memshard_app, memshard_owner",
                "REVOKE ALTER SYSTEM ON PARAMETER synchronous_standby_names FROM memshard_owner",
            ):
                await servers.execute(FIRST, statement)
            async with as_owner(plan.catalog_server(), plan.secrets) as connection:
                await connection.execute(
                    "DROP TABLE sync_sets, replicas; DELETE FROM schema_migrations WHERE number = 3"
                )
        record, secrets = load_record(layout), load_secrets(layout)
        layout.record.write_text(record.model_dump_json(exclude={"replicas": True}))
        layout.secrets.write_text(secrets.model_dump_json(exclude={"memshard_replication": True}))
        async with running(layout) as plan:
            servers = Servers(plan)
            assert (await servers.sync_set()).primary == FIRST
            assert await servers.execute(FIRST, "SELECT FROM pg_roles WHERE rolname = 'memshard_replication'")
            (may,) = await servers.execute(
                FIRST, "SELECT has_parameter_privilege('memshard_owner', 'synchronous_standby_names', 'ALTER SYSTEM')"
            )
            assert may[0]


@pytest.mark.slow
async def test_a_standby_that_somebody_promoted_is_made_anew() -> None:
    with fresh_layout() as layout:
        async with servers_of(layout) as servers:
            await servers.execute(FIRST, "CREATE TABLE t AS SELECT 7 AS x")
            await eventually(lambda: _has(servers, SECOND, {7}))
            await servers.execute(SECOND, "SELECT pg_promote()")
            await eventually(lambda: _writes(servers, SECOND, "INSERT INTO t VALUES (8)"))
            assert await eventually(servers.primary, within_s=20) == FIRST
            assert await rows(servers, SECOND) == {7}


@pytest.mark.slow
async def test_a_standby_that_cannot_follow_is_made_anew() -> None:
    with fresh_layout() as layout:
        async with servers_of(layout) as servers:
            await servers.execute(SECOND, "ALTER SYSTEM SET primary_slot_name = 'there_is_no_such_slot'")
            await servers.execute(SECOND, "SELECT pg_reload_conf()")
            before = servers.pid(SECOND)
            await eventually(lambda: servers.pid(SECOND) != before, within_s=25)
            assert await eventually(servers.primary, within_s=20) == FIRST


@pytest.mark.slow
async def test_a_slot_that_nobody_uses_is_dropped_and_one_of_somebody_elses_is_not() -> None:
    with fresh_layout() as layout:
        async with servers_of(layout) as servers:
            for name in (slot_name(FIRST), "of_somebody_else"):
                await servers.execute(FIRST, "SELECT pg_create_physical_replication_slot($1, true)", name)
            await eventually(lambda: _slots_are(servers, FIRST, {slot_name(SECOND), "of_somebody_else"}))


@pytest.mark.slow
async def test_one_that_was_appointed_and_not_promoted_yet_is_promoted_by_the_next_supervisor() -> None:
    with fresh_layout() as layout:
        async with servers_of(layout) as servers:
            await servers.arm()
        async with in_a_process(layout) as supervisor:
            await eventually(servers.primary)
            supervisor.kill()
            await supervisor.wait()
            planned = await servers.sync_set()
            async with as_owner(servers.plan.catalog_server(), servers.plan.secrets) as connection:
                epoch = await catalog.read_epoch(connection)
                await catalog.change_primary(connection, epoch, SHARD, planned, primary=SECOND, members=frozenset())
        async with running(layout):
            assert await eventually(servers.primary, within_s=20) == SECOND


async def test_a_new_primary_that_dies_before_it_is_promoted_is_promoted_all_the_same() -> None:
    with fresh_layout() as layout:
        async with supervised_servers(layout) as (servers, shard):
            await servers.arm()

            def tell(progress: Progress) -> None:
                if progress.step is Step.RECORDED:
                    os.kill(servers.pid(progress.new), signal.SIGKILL)

            began = time.monotonic()
            async with asyncio.timeout(30):
                await PlannedFailover(shard, tell).run()
            print(f"promoted and followed after {time.monotonic() - began:.1f} s")
            assert await eventually(servers.primary, within_s=20) == SECOND


@pytest.mark.slow
async def test_a_failover_on_request_is_refused_before_it_ends_anything_when_too_few_answer() -> None:
    with fresh_layout() as layout:
        async with supervised_servers(layout, replicas=2) as (servers, shard):
            await servers.arm()
            before = servers.pid(FIRST)
            failover = PlannedFailover(shard, lambda _progress: None)
            # Of two members both are needed: each alone may lack what the other has confirmed.
            with frozen(servers, THIRD), pytest.raises(RefusedError, match=f"^{THIRD} does not answer$"):
                await failover.run(SECOND)
            assert (servers.pid(FIRST), await servers.writable()) == (before, [FIRST])
            assert await eventually(servers.primary) == FIRST


@pytest.mark.slow
async def test_a_failover_on_request_does_not_wait_for_a_frozen_standby_that_it_can_do_without() -> None:
    with fresh_layout() as layout:
        async with supervised_servers(layout, replicas=3) as (servers, shard):
            await servers.arm()
            at: dict[Step, float] = {}
            failover = PlannedFailover(shard, lambda progress: at.update({progress.step: time.monotonic()}))
            with frozen(servers, "postgres-shard-0-3"):
                await failover.run(SECOND)
            without_writes_s = at[Step.PROMOTED] - at[Step.CHECKED]
            print(f"{without_writes_s:.2f} s from the old primary's end to the new one's beginning")
            assert without_writes_s < 3
            assert await eventually(servers.primary, within_s=30) == SECOND


@pytest.mark.slow
async def test_a_new_primary_knows_of_its_standbys_before_it_can_be_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """An erasure right after a failover has to know that a standby which does not answer has not replayed it."""
    present: set[str] = set()
    promote = replication.promote

    async def look_first(server: Server, secrets: Secrets) -> None:
        present.update(slot.name for slot in (await replication.look_at_standby(server, secrets)).slots)
        await promote(server, secrets)

    monkeypatch.setattr(replication, "promote", look_first)
    with fresh_layout() as layout:
        async with servers_of(layout, replicas=2) as servers:
            await servers.arm()
            os.kill(servers.pid(FIRST), signal.SIGKILL)
            await eventually(lambda: _writes(servers, SECOND))
            assert present == {slot_name(FIRST), slot_name(THIRD)}


@pytest.mark.slow
async def test_a_primary_whose_directory_is_lost_waits_for_a_standby_that_starts_slowly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with fresh_layout() as layout:
        async with servers_of(layout) as servers:
            await servers.arm()
            await servers.execute(FIRST, "CREATE TABLE t AS SELECT 7 AS x")
        shutil.rmtree(servers[FIRST].pgdata)
        tries: list[str] = []
        fail_over, prepare_standby = ShardServers._fail_over, ShardServers._prepare_standby

        async def counted(self: ShardServers, dead: str, **given: bool) -> None:
            tries.append(dead)
            await fail_over(self, dead, **given)

        async def slowly(self: ShardServers, server: Server) -> None:
            await eventually(lambda: len(tries) > MAX_EARLY_DEATHS + 1, within_s=30)
            await prepare_standby(self, server)

        monkeypatch.setattr(ShardServers, "_fail_over", counted)
        monkeypatch.setattr(ShardServers, "_prepare_standby", slowly)
        async with running(layout):
            assert await eventually(servers.primary, within_s=20) == SECOND
            assert await rows(servers, SECOND) == {7}


@pytest.mark.slow
async def test_a_primary_whose_directory_is_lost_is_not_waited_for_when_nobody_may_take_its_place() -> None:
    with fresh_layout() as layout:
        async with servers_of(layout) as servers:
            await servers.execute(FIRST, "CREATE TABLE t AS SELECT 7 AS x")
        shutil.rmtree(servers[FIRST].pgdata)
        with pytest.raises(ExceptionGroup) as raised:
            async with running(layout):
                pass
        assert raised.group_contains(StartError, match="is missing, .* no standby is sure to have all")


@pytest.mark.slow
async def test_copies_that_a_killed_supervisor_left_are_removed() -> None:
    with fresh_layout() as layout:
        async with running(layout) as plan:
            pgdata = plan.shard_server(SHARD).pgdata
        copies = [pgdata.with_name(pgdata.name + suffix) for suffix in (".old", ".new")]
        for copy in copies:
            shutil.copytree(pgdata, copy)
        async with running(layout):
            assert [copy for copy in copies if copy.exists()] == []
            assert await Servers(plan).writable() == [FIRST]


@contextmanager
def frozen(servers: Servers, name: str) -> Iterator[None]:
    """While it lasts, a server and all its backends stand still."""
    processes = leftovers.find_postgres(servers[name].pgdata)
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.resume()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
async def test_a_supervisor_killed_in_a_failover_leaves_what_the_next_sorts_out(seed: int) -> None:
    delay_s = random.Random(seed).uniform(0.0, 0.6)
    print(f"killed {delay_s:.3f} s after the primary")
    with fresh_layout() as layout:
        async with servers_of(layout) as servers:
            await servers.execute(FIRST, "CREATE TABLE t (x int)")
        async with in_a_process(layout) as supervisor:
            assert await servers.arm() == FIRST
            await servers.execute(FIRST, "INSERT INTO t VALUES (1)")
            os.kill(servers.pid(FIRST), signal.SIGKILL)
            clock = time.monotonic() + delay_s
            await eventually(lambda: time.monotonic() >= clock)
            supervisor.kill()
        async with running(layout):
            primary = await eventually(servers.primary, within_s=30)
            assert await rows(servers, primary) == {1}
            assert (await servers.sync_set()).primary == primary
            print(f"the primary is {primary}")
    assert leftovers.find(layout.root) == []


async def _writes(servers: Servers, name: str, statement: str = "CREATE TABLE probe (x int)") -> bool:
    await servers.execute(name, statement)
    return True


async def _has(servers: Servers, name: str, expected: set[int]) -> bool:
    return await rows(servers, name) == expected


async def _slots(servers: Servers, name: str) -> set[str]:
    try:
        view = await replication.look_at_primary(servers[name], servers.plan.secrets)
    except LocalClusterError:
        return set()
    return {slot.name for slot in view.slots if slot.active}


async def _slots_are(servers: Servers, name: str, expected: set[str]) -> bool:
    view = await replication.look_at_primary(servers[name], servers.plan.secrets)
    return {slot.name for slot in view.slots} == expected
