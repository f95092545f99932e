"""What runs, as the supervisor writes it whenever a process starts or ends."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from common.topology import CLUSTER, Topology
from local.layout import Layout, write_atomically

Role = Literal["supervisor", "router", "shard", "replica", "postgres-primary", "postgres-standby", "redis"]

AUTO = "auto"
"""Of a degradation level: each router decides by what it sees."""


class _State(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class ProcessState(_State):
    """One process; `pid` is None while it is not running."""

    name: str
    role: Role
    shard_id: str | None = None
    pid: int | None = None
    created_at: float | None = None
    port: int | None = None


class ShardState(_State):
    """One shard in the topology. `address` is its service's."""

    shard_id: str
    status: str
    slots: int
    address: str
    replicas: list[str] = []
    level: str = AUTO
    """The degradation level that an operator has set for it."""


class TopologyState(_State):
    """The topology, as it was last seen."""

    epoch: int
    shards: list[ShardState]
    level: str = AUTO
    """The degradation level that an operator has set for the cluster."""

    @classmethod
    def of(cls, topology: Topology) -> "TopologyState":
        """Of a topology that was read from the catalog."""
        return cls(
            epoch=topology.epoch,
            shards=[
                ShardState(
                    shard_id=shard.shard_id,
                    status=shard.status.value,
                    slots=topology.slot_count(shard.shard_id),
                    address=shard.address,
                    replicas=[replica.replica_id for replica in shard.replicas],
                    level=_level_of(topology, shard.shard_id),
                )
                for shard in topology.shards
            ],
            level=_level_of(topology, CLUSTER),
        )


class State(_State):
    """The state file."""

    addresses: list[str] = []
    """The routers'."""
    processes: list[ProcessState] = []
    topology: TopologyState | None = None

    def save(self, layout: Layout) -> None:
        """Writes it. Not durably: after a loss of power nothing of it is true anyway."""
        write_atomically(layout.state, self.model_dump_json(indent=2) + "\n", durable=False)


def _level_of(topology: Topology, name: str) -> str:
    return topology.levels[name].name.lower() if name in topology.levels else AUTO


def load_state(layout: Layout) -> State:
    """The state file; empty when there is none that can be read, since what runs is found without it too."""
    try:
        return State.model_validate_json(layout.state.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValidationError):
        return State()
