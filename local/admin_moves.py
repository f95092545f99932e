"""Shards and moves of slots, as ClusterService offers them: what the mover tells, as messages of the contract."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from google.protobuf.message import Message

from common import catalog, catalog_shards, errors
from common.catalog_moves import read_moves
from common.move_message import message_of
from common.moves import MAX_ROLLBACK_WINDOW_S
from common.slots import SLOT_COUNT, slot_of
from common.topology import ShardStatus
from local import mover
from local.admin_streams import Lasting, Stream
from local.cluster import Plan
from local.errors import LocalClusterError
from local.growth import Growth
from local.sessions import as_owner
from memshard.admin.v1 import cluster_pb2

_CATALOG_TIMEOUT_S = 10.0
_MAX_WEIGHT = 10_000
# The topology may change meanwhile, as by a failover.
_TRIES = 5


class Moves:
    """The rpcs about shards and moves. Several movers may be at work: leases keep them apart."""

    def __init__(self, plan: Plan, growth: Growth, log: logging.Logger) -> None:
        self._plan = plan
        self._growth = growth
        self._lasting = Lasting()
        self._movers: set[asyncio.subprocess.Process] = set()
        self._log = log

    def streams(self) -> dict[str, tuple[type[Message], Stream]]:
        """The rpcs that tell how far they are, by name, each with the type of its request."""
        return {
            "AddShard": (cluster_pb2.AddShardRequest, self._add),
            "RemoveShard": (cluster_pb2.RemoveShardRequest, self._remove),
            "Rebalance": (cluster_pb2.RebalanceRequest, self._rebalance),
            "DrainShard": (cluster_pb2.DrainShardRequest, self._drain),
            "ResumeMove": (cluster_pb2.ResumeMoveRequest, self._resume),
            "RollbackMove": (cluster_pb2.RollbackMoveRequest, self._roll_back),
        }

    def stop(self) -> None:
        """Tells movers to end, while there still are databases in which they can leave things in order."""
        for process in self._movers:
            if process.returncode is None:
                process.terminate()

    async def close(self) -> None:
        """Ends what is still at work."""
        await self._lasting.close()

    async def list_shards(self) -> cluster_pb2.ListShardsResponse:
        """Raises LocalClusterError."""
        plan = self._plan
        async with as_owner(plan.catalog_server(), plan.secrets, _CATALOG_TIMEOUT_S) as connection:
            topology = await catalog.read_topology(connection)
        return cluster_pb2.ListShardsResponse(
            epoch=topology.epoch,
            shards=[
                cluster_pb2.ShardInfo(
                    shard_id=shard.shard_id,
                    status=shard.status.value,
                    weight=shard.weight,
                    slots=topology.slot_count(shard.shard_id),
                    address=shard.address,
                    replicas=[replica.replica_id for replica in shard.replicas],
                )
                for shard in topology.shards
            ],
        )

    async def set_shard(self, request: cluster_pb2.SetShardRequest) -> cluster_pb2.SetShardResponse:
        """Raises LocalClusterError, InvalidArgument, NotFound."""
        self._require_shard(request.shard_id)
        try:
            status = ShardStatus(request.status) if request.status else None
        except ValueError as error:
            raise errors.InvalidArgument.field("status", "INVALID_ENUM", "is no status of a shard") from error
        if not 0 <= request.weight <= _MAX_WEIGHT:
            raise errors.InvalidArgument.field("weight", "OUT_OF_RANGE", f"must be 0 to {_MAX_WEIGHT}")
        plan = self._plan
        async with as_owner(plan.catalog_server(), plan.secrets, _CATALOG_TIMEOUT_S) as connection:
            for _ in range(_TRIES):
                epoch = await catalog.read_epoch(connection)
                try:
                    if status is not None:
                        epoch = await catalog_shards.set_status(connection, epoch, request.shard_id, status)
                    if request.weight:
                        epoch = await catalog_shards.set_weight(connection, epoch, request.shard_id, request.weight)
                except catalog.EpochConflictError:
                    continue
                self._log.warning("%s is set to %s", request.shard_id, request.status or f"weight {request.weight}")
                return cluster_pb2.SetShardResponse(epoch=epoch)
        raise LocalClusterError("the catalog keeps changing")

    async def list_moves(self) -> cluster_pb2.ListMovesResponse:
        """Raises LocalClusterError."""
        plan = self._plan
        async with as_owner(plan.catalog_server(), plan.secrets, _CATALOG_TIMEOUT_S) as connection:
            return cluster_pb2.ListMovesResponse(moves=map(message_of, await read_moves(connection)))

    async def pin(self, request: cluster_pb2.PinUserRequest) -> cluster_pb2.PinUserResponse:
        """Raises LocalClusterError, InvalidArgument, FailedPrecondition."""
        if not request.user_id:
            raise errors.InvalidArgument.field("user_id", "REQUIRED", "is required")
        if self._plan.record.placement is not catalog.PlacementStrategy.USER_BASED:
            raise errors.FailedPrecondition("users have no slot of their own in this cluster", reason="NOT_POSSIBLE")
        slot = slot_of(request.user_id.encode())
        shard = ["--shard", request.shard_id] if request.shard_id else []
        # By its slot: a user's name must not be seen among the processes of the machine.
        await mover.last_of(self._plan, ["pin" if shard else "unpin", "--slot", str(slot), *shard])
        return cluster_pb2.PinUserResponse(slot=slot)

    async def _add(self, request: cluster_pb2.AddShardRequest) -> AsyncGenerator[cluster_pb2.ShardProgress, None]:
        if not 0 <= request.weight <= _MAX_WEIGHT:
            raise errors.InvalidArgument.field("weight", "OUT_OF_RANGE", f"must be 0 to {_MAX_WEIGHT}")
        shard_id = ""
        async for shard_id, message in self._lasting.follow(self._growth.add(request.weight or 1)):
            yield cluster_pb2.ShardProgress(shard_id=shard_id, message=message)
        yield cluster_pb2.ShardProgress(shard_id=shard_id, done=True)

    async def _remove(self, request: cluster_pb2.RemoveShardRequest) -> AsyncGenerator[cluster_pb2.ShardProgress, None]:
        async for shard_id, message in self._lasting.follow(self._growth.remove(request.shard_id)):
            yield cluster_pb2.ShardProgress(shard_id=shard_id, message=message)
        yield cluster_pb2.ShardProgress(shard_id=request.shard_id, done=True)

    def _rebalance(self, request: cluster_pb2.RebalanceRequest) -> AsyncGenerator[cluster_pb2.MoveProgress, None]:
        return self._moved("plan" if request.plan_only else "rebalance", options=_options(request))

    def _drain(self, request: cluster_pb2.DrainShardRequest) -> AsyncGenerator[cluster_pb2.MoveProgress, None]:
        self._require_shard(request.shard_id)
        return self._moved("drain", "--shard", request.shard_id, options=_options(request))

    def _resume(self, request: cluster_pb2.ResumeMoveRequest) -> AsyncGenerator[cluster_pb2.MoveProgress, None]:
        which = ["--move", str(request.move_id)] if request.move_id else []
        options = _options(request)
        # Not a setting of the mover's, which would be for the moves that it makes.
        window_s = options.pop("rollback_window_s", None)
        window = [] if window_s is None else ["--rollback-window", str(window_s)]
        return self._moved("resume", *which, *window, options=options)

    def _roll_back(self, request: cluster_pb2.RollbackMoveRequest) -> AsyncGenerator[cluster_pb2.MoveProgress, None]:
        lost = ["--target-lost"] if request.target_lost else []
        return self._moved("rollback", "--move", str(request.move_id), *lost)

    async def _moved(
        self, *arguments: str, options: dict[str, Any] | None = None
    ) -> AsyncGenerator[cluster_pb2.MoveProgress, None]:
        self._log.info("the mover is asked for: %s", " ".join(arguments))
        # Closed at once when the caller leaves: the mover is told to end.
        started: list[asyncio.subprocess.Process] = []

        def keep(process: asyncio.subprocess.Process) -> None:
            started.append(process)
            self._movers.add(process)

        try:
            async with aclosing(mover.run(self._plan, *arguments, options=options, started=keep)) as events:
                async for event in events:
                    if (message := _of_event(event)) is not None:
                        yield message
        finally:
            self._movers.difference_update(started)

    def _require_shard(self, shard_id: str) -> None:
        known = self._plan.record.shard_ids()
        if shard_id not in known:
            raise errors.NotFound(f"there is no shard {shard_id!r}, only {', '.join(known)}", reason="SHARD_NOT_FOUND")


def _options(
    request: cluster_pb2.RebalanceRequest | cluster_pb2.DrainShardRequest | cluster_pb2.ResumeMoveRequest,
) -> dict[str, Any]:
    """The mover's settings that a request changes. Raises InvalidArgument."""
    if request.max_rate < 0:
        raise errors.InvalidArgument.field("max_rate", "OUT_OF_RANGE", "must be 0 or more")
    if not 0 <= request.concurrency <= 8:
        raise errors.InvalidArgument.field("concurrency", "OUT_OF_RANGE", "must be 0 to 8")
    options: dict[str, Any] = {"max_rate": request.max_rate} if request.max_rate else {}
    if request.concurrency:
        options["concurrency"] = request.concurrency
    if not isinstance(request, cluster_pb2.ResumeMoveRequest) and request.max_slots:
        if not 1 <= request.max_slots <= SLOT_COUNT:
            raise errors.InvalidArgument.field("max_slots", "OUT_OF_RANGE", f"must be 0 to {SLOT_COUNT}")
        options["max_slots"] = request.max_slots
    if request.HasField("rollback_window_s"):
        if not 0 <= request.rollback_window_s <= MAX_ROLLBACK_WINDOW_S:
            raise errors.InvalidArgument.field(
                "rollback_window_s", "OUT_OF_RANGE", f"must be 0 to {MAX_ROLLBACK_WINDOW_S}"
            )
        options["rollback_window_s"] = request.rollback_window_s
    return options


def _of_event(event: Mapping[str, Any]) -> cluster_pb2.MoveProgress | None:
    match event["event"]:
        case "plan":
            moves = [_range(move) for move in event["moves"]]
            return cluster_pb2.MoveProgress(plan=cluster_pb2.MovePlan(slots=event["slots"], moves=moves))
        case "waiting":
            return cluster_pb2.MoveProgress(wait=cluster_pb2.MoveWait(shard_ids=event["for"]))
        case "move":
            move = _range(event)
            move.move_id, move.step, move.attempts = event["move_id"], event["step"], event["attempts"]
            move.error = event.get("error", "")
            return cluster_pb2.MoveProgress(
                state=cluster_pb2.MoveState(
                    move=move,
                    rows=event.get("rows", 0),
                    total_rows=event.get("total", 0),
                    rows_per_s=event.get("rate", 0),
                    lag_ms=event.get("lag_ms"),
                    pause_ms=event.get("pause_ms"),
                )
            )
    return None


def _range(event: Mapping[str, Any]) -> cluster_pb2.Move:
    return cluster_pb2.Move(
        first_slot=event["first"], last_slot=event["last"], source=event["source"], target=event["target"]
    )
