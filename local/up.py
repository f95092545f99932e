"""`memshard up`: from options and a data directory to a running cluster, and back."""

import asyncio
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from local import admin, bootstrap, leftovers, lock, logs, ports, standby
from local.account import make_traversable, postgres_account
from local.admin_token import make_token
from local.appointment import Appointer
from local.binaries import require_local_embedder
from local.cluster import ADMIN, Plan, Programs, port_names
from local.errors import DataDirectoryError, LocalClusterError, OptionsError
from local.growth import Growth
from local.layout import Layout
from local.move_watch import MoveWatch
from local.record import Embedder, Options, Secrets, load_record, load_secrets, settle
from local.shard_servers import ShardServers, Ties
from local.shard_watch import ShardWatch
from local.silence import DEFAULT_HUNG_AFTER_S, SilenceWatch
from local.specs import Specs
from local.standby import Maker
from local.steps import Steps
from local.supervisor import Hooks, Supervisor

DEFAULT_PORT = 50051
DEFAULT_ROUTERS = 1
MAX_ROUTERS = 16

# Someone who only looks at the lock holds it for an instant.
_LOCK_TIMEOUT_S = 0.5


@dataclass(frozen=True, slots=True)
class Request:
    """What an `up` was asked for."""

    data_dir: Path
    options: Options = field(default_factory=Options)
    port: int = DEFAULT_PORT
    routers: int = DEFAULT_ROUTERS
    hung_after_s: float = DEFAULT_HUNG_AFTER_S
    """Seconds without an answer after which a service counts as hung, and is ended and started again; 0: never."""

    def router_ports(self) -> tuple[int, ...]:
        """One port for each router. Raises OptionsError."""
        if not 1 <= self.routers <= MAX_ROUTERS:
            raise OptionsError(f"--routers must be 1 to {MAX_ROUTERS}")
        if not 1 <= self.port <= 65536 - self.routers:
            raise OptionsError("--port must be 1 to 65535, with room above it for every router")
        return tuple(range(self.port, self.port + self.routers))


@dataclass(frozen=True, slots=True)
class Ready:
    """What there is to say about a cluster that is ready."""

    addresses: tuple[str, ...]
    data_dir: str
    log_dir: str
    embedder: Embedder
    dimensions: int
    seconds: float


class Observer(Protocol):
    """Who follows an `up`."""

    def progress(self, name: str) -> None:
        """The process or step `name` is ready."""

    def ready(self, ready: Ready) -> None:
        """The cluster is ready."""

    def stopping(self) -> None:
        """The end has begun."""


def check(request: Request) -> None:
    """Finds what can be found to be wrong before anything is made or started. Raises LocalClusterError."""
    layout = Layout.of(request.data_dir)
    router_ports = request.router_ports()
    layout.require_own()
    kept = load_record(layout) if layout.exists() else None
    settle(request.options, kept if kept and kept.complete else None)
    if layout.lock.exists():
        with lock.held(layout, (), _LOCK_TIMEOUT_S):
            """Nobody else holds it: had somebody, that would be the error."""
    # What a killed supervisor left behind has the ports, and is ended before they are needed.
    if not leftovers.find(layout.root):
        ports.require_free(router_ports)


async def run(request: Request, observer: Observer) -> None:
    """Runs the cluster until SIGINT, SIGTERM or SIGHUP.

    Raises LocalClusterError, and CancelledError when a signal came before there was anything to stop.
    """
    began = time.monotonic()
    layout = Layout.of(request.data_dir)
    router_ports = request.router_ports()
    addresses = tuple(f"{ports.HOST}:{port}" for port in router_ports)
    layout.claim()
    with _interruptible() as interruption, lock.held(layout, addresses, _LOCK_TIMEOUT_S), _logger(layout) as log:
        ended = await leftovers.end_all(layout.root)
        if ended:
            log.warning("ended %d processes that an earlier supervisor left behind", ended)
        ports.require_free(router_ports)
        plan, programs = await prepare(layout, request.options, router_ports, log)

        def ready() -> None:
            observer.ready(
                Ready(
                    addresses=addresses,
                    data_dir=str(layout.root),
                    log_dir=str(layout.logs),
                    embedder=plan.record.embedder,
                    dimensions=plan.record.dimensions,
                    seconds=time.monotonic() - began,
                )
            )

        hooks = Hooks(observer.progress, ready, observer.stopping)
        # The routers want it too, when they start.
        token = make_token(layout)
        shards = shard_servers(plan, programs, log)
        steps = Steps(plan, shards)
        supervisor = supervise(plan, programs, shards, hooks, log, steps=steps, hung_after_s=request.hung_after_s)
        growth = Growth(plan, programs, shards, supervisor, steps, log)
        async with admin.serving(
            plan.record.ports[ADMIN], token, plan, shards, growth, supervisor.processes, log
        ) as moves:

            def stopping() -> None:
                moves.stop()
                observer.stopping()

            hooks.stopping = stopping
            interruption.action = supervisor.stop
            await supervisor.run()


async def prepare(
    layout: Layout, options: Options, router_ports: Sequence[int], log: logging.Logger
) -> tuple[Plan, Programs]:
    """Everything before the first process: what is kept is read, or the cluster's directories are made.

    To be called with the lock held. Raises LocalClusterError.
    """
    kept = load_record(layout) if layout.exists() else None
    if kept is not None and not kept.complete:
        log.warning("an earlier start was cut off while it made the cluster; making it again")
        bootstrap.discard_unfinished(layout)
        kept = None
    record = settle(options, kept)
    if record.embedder == "local":
        require_local_embedder()
    account = postgres_account()
    make_traversable(layout.postgres, account)
    try:
        chosen = ports.choose(port_names(record, len(router_ports)), record.ports, avoid=router_ports)
        record = record.model_copy(update={"ports": chosen})
        if record != kept:
            record.save(layout)  # First of all: the mark that this directory is ours.
        layout.make_directories()
        programs = Programs.find(layout, account)
        if kept is None:
            secrets = Secrets.generate()
            secrets.save(layout)
        else:
            loaded = load_secrets(layout)
            secrets = loaded.completed()
            if secrets != loaded:
                secrets.save(layout)
    except OSError as error:
        raise DataDirectoryError(f"{error.filename or layout.root}: {error.strerror}") from error
    plan = Plan(layout, record, secrets, tuple(router_ports))
    if kept is None:
        await bootstrap.make_data_directories(plan.first_servers(), programs.postgres_bin, account, secrets)
    else:
        for server in [plan.catalog_server(), *(s for i in record.shard_ids() for s in plan.shard_servers(i).values())]:
            for copy in standby.sweep(server.pgdata):
                log.warning("removed %s, which an earlier supervisor left behind", copy)
        # A shard with standbys may still have all its data when one directory is missing.
        bootstrap.require_data_directories(plan.first_servers() if record.replicas == 0 else [plan.catalog_server()])
    return plan, programs


def shard_servers(plan: Plan, programs: Programs, log: logging.Logger) -> dict[str, ShardServers]:
    """The PostgreSQL servers of each shard, by its id."""
    maker = Maker(programs.postgres_bin, programs.account, plan.secrets, log)
    return {
        shard_id: ShardServers(
            Appointer(shard_id, plan.catalog_server(), plan.shard_servers(shard_id), plan.secrets),
            plan.record.replica_names(shard_id),
            maker,
            log,
            new=not plan.record.complete,
        )
        for shard_id in plan.record.shard_ids()
    }


def supervise(
    plan: Plan,
    programs: Programs,
    shards: Mapping[str, ShardServers],
    hooks: Hooks,
    log: logging.Logger,
    *,
    steps: Steps | None = None,
    services: bool = True,
    hung_after_s: float = DEFAULT_HUNG_AFTER_S,
) -> Supervisor:
    """The supervisor of a cluster; without its `services` only the databases and what is in them."""
    steps = steps or Steps(plan, shards)
    specs = Specs(plan, programs, shards)
    silence = SilenceWatch(lambda: supervisor.processes(), log, hung_after_s)  # noqa: PLW0108  # It is made below.
    supervisor = Supervisor(
        plan.layout,
        [*specs.databases(), *(specs.services() if services else [])],
        steps.all(),
        [
            *(ShardWatch(shard).run for shard in shards.values()),
            steps.follow_topology,
            silence.run,
            *([MoveWatch(plan, log).run] if services else []),
        ],
        addresses=plan.addresses(),
        topology=lambda: steps.topology,
        hooks=hooks,
        log=log,
    )
    steps.changed = supervisor.save_state
    for shard in shards.values():
        shard.ties = Ties(supervisor.process, supervisor.save_state)
    return supervisor


@contextmanager
def _logger(layout: Layout) -> Iterator[logging.Logger]:
    logger, handler = logs.supervisor_logger(layout.log("supervisor"))
    logger.info("supervisor's pid %d", os.getpid())
    try:
        yield logger
    except LocalClusterError as error:
        logger.error("%s", error)  # noqa: TRY400  # It is written for people.
        raise
    except Exception:
        logger.exception("the supervisor failed")
        raise
    finally:
        logger.removeHandler(handler)
        handler.close()


@dataclass(slots=True)
class _Interruption:
    """What a signal does at the moment."""

    action: Callable[[], object]

    def act(self) -> None:
        """Does it."""
        self.action()


@contextmanager
def _interruptible() -> Iterator[_Interruption]:
    """SIGINT, SIGTERM and SIGHUP cancel the current task, until their action is set to something else."""
    task = asyncio.current_task()
    assert task is not None
    interruption = _Interruption(task.cancel)
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for number in numbers:
        loop.add_signal_handler(number, interruption.act)
    try:
        yield interruption
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
