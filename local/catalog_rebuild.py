"""`memshard catalog rebuild`: a new catalog for a stopped cluster that has lost its own, from what its shards say."""

import asyncio
import logging
from collections.abc import Callable

from common import roles
from local import bootstrap, leftovers, lock, mover, standby, up
from local.account import postgres_account
from local.cluster import Plan, Programs
from local.controldata import last_checkpoint, timeline
from local.errors import DataDirectoryError, LocalClusterError
from local.layout import Layout
from local.postgres import Server, run_program
from local.record import load_record, load_secrets
from local.sessions import as_owner
from local.shard_servers import ShardServers
from local.specs import Specs
from local.steps import CATALOG_STEP
from local.supervisor import Hooks, Step, Supervisor

_LOCK_TIMEOUT_S = 0.5
_LOST = ".lost"


async def rebuild(layout: Layout, tell: Callable[[str], None]) -> int:
    """Makes it; the epoch of the new catalog. The cluster must not run. Raises LocalClusterError."""
    log = logging.getLogger("memshard.supervisor")
    if not layout.exists():
        raise DataDirectoryError(f"there is no cluster in {layout.root}")
    with lock.held(layout, (), _LOCK_TIMEOUT_S):
        await leftovers.end_all(layout.root)
        record = load_record(layout)
        secrets = load_secrets(layout).completed()
        secrets.save(layout)
        account = postgres_account()
        plan = Plan(layout, record, secrets, ())
        programs = Programs.find(layout, account)
        catalog_server = plan.catalog_server()
        if catalog_server.pgdata.exists():
            aside = catalog_server.pgdata.with_name(catalog_server.pgdata.name + _LOST)
            if aside.exists():
                raise DataDirectoryError(f"{aside} is there from an earlier attempt; move it away first")
            catalog_server.pgdata.rename(aside)
            tell(f"what there was of the catalog is kept in {aside}")
        await bootstrap.make_data_directories([catalog_server], programs.postgres_bin, account, secrets)
        return await _with_databases(plan, programs, log, tell)


async def _with_databases(plan: Plan, programs: Programs, log: logging.Logger, tell: Callable[[str], None]) -> int:
    shards = up.shard_servers(plan, programs, log)
    for shard in shards.values():
        await _find_primary(shard, programs)
        tell(f"{shard.primary} is the primary of {shard.shard_id}")
    specs = Specs(plan, programs, shards)
    unmade = Specs(
        Plan(plan.layout, plan.record.model_copy(update={"complete": False}), plan.secrets, ()), programs, {}
    )

    async def make_catalog() -> None:
        server = plan.catalog_server()
        await bootstrap.make_database(server, plan.secrets, vector=False)
        await bootstrap.make_mover(server, plan.secrets)

    ready = asyncio.Event()
    supervisor = Supervisor(
        plan.layout,
        [unmade.catalog(), *(specs.shard_server(shard, shard.primary) for shard in shards.values())],
        [Step(CATALOG_STEP, make_catalog, (plan.catalog_server().name,))],
        hooks=Hooks(ready=ready.set),
        log=log,
    )
    async with asyncio.TaskGroup() as group:
        run = group.create_task(supervisor.run())
        waiting = group.create_task(ready.wait())
        await asyncio.wait([run, waiting], return_when=asyncio.FIRST_COMPLETED)
        try:
            for shard in shards.values():
                await bootstrap.complete_shard_server(shard.servers[shard.primary], plan.secrets)
            epoch = await _rebuild(plan)
        finally:
            waiting.cancel()
            supervisor.stop()
    return epoch


async def _rebuild(plan: Plan) -> int:
    arguments = ["rebuild"]
    for shard in plan.shards():
        arguments += ["--shard", f"{shard.shard_id}={shard.address}"]
        for replica in shard.replicas:
            arguments += ["--replica", f"{shard.shard_id}/{replica.replica_id}={replica.address}"]
    server = plan.catalog_server()
    last = await mover.last_of(plan, arguments, options={"catalog_dsn": server.owner_dsn(plan.secrets)})
    async with as_owner(server, plan.secrets) as connection:
        await roles.let_read(connection)
    return int(last["epoch"])


async def _find_primary(shard: ShardServers, programs: Programs) -> None:
    """Has the server be the primary that is no standby on disk; of several the one whose log is the newest."""
    candidates: list[tuple[tuple[int, int], str]] = []
    for name, server in shard.servers.items():
        if standby.exists(server.pgdata) and not standby.is_standby(server.pgdata):
            candidates.append((await _progress(server, programs), name))
    if not candidates:
        raise LocalClusterError(f"no server of {shard.shard_id} was its primary; start one by hand to find out why")
    shard.assume(max(candidates)[1])


async def _progress(server: Server, programs: Programs) -> tuple[int, int]:
    text = await run_program(
        [str(programs.postgres_bin / "pg_controldata"), str(server.pgdata)], server.pgdata, programs.account
    )
    return timeline(text), last_checkpoint(text)
