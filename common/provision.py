"""Making a cluster of PostgreSQL servers that somebody else runs: databases, roles, and the catalog from a description.

Everything may be done again, and then brings up to date what may change: passwords, grants, tables, addresses. What is
fixed when a cluster is made is compared, never changed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from common import catalog, postgres, roles
from common.catalog import (
    DEFAULT_TEXT_LANGUAGE,
    MAX_DIMENSIONS,
    TEXT_LANGUAGE,
    CatalogError,
    Cluster,
    EpochConflictError,
    PlacementStrategy,
    Precision,
)
from common.local_model import LOCAL_DIMENSIONS, local_model_name
from common.postgres import Connection
from common.roles import Login
from common.sync_set import SyncSet
from common.topology import Replica, Shard, Topology

# Whoever moves slots changes the topology too, now and then.
_TRIES = 5

# A DNS label, as the settings of shards and replicas want it.
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]
Address = Annotated[str, StringConstraints(pattern=r"^(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):[0-9]{1,5}$")]


class DescriptionError(Exception):
    """The description of the cluster cannot be; the message names what is at fault."""


class _Described(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ShardDescription(_Described):
    """One shard."""

    address: Address
    """Where routers reach its service, as host:port."""
    weight: Annotated[int, Field(ge=1, le=1000)] = 1
    """Its share of the slots beside the others', when the cluster is made."""
    replicas: dict[Name, Address] = {}
    """Where routers reach its replicas, by name."""
    primary_server: str | None = None
    """cluster_name of its primary, for shards that keep their sync set themselves (`sync_set: managed`)."""


class ClusterDescription(_Described):
    """A cluster, as a file describes it. All but addresses and replicas is fixed when it is made."""

    embedder: Literal["local", "http", "none"] = "local"
    """Who turns text into embeddings, as in the settings of routers and shards."""
    embedder_model: str | None = None
    """The model of the `http` embedder."""
    dimensions: int | None = None
    """Length of an embedding. 256 with `local`, else 1536."""
    precision: Precision = Precision.HALF
    placement: PlacementStrategy = PlacementStrategy.USER_BASED
    text_language: Annotated[str, StringConstraints(pattern=TEXT_LANGUAGE)] = DEFAULT_TEXT_LANGUAGE
    shards: Annotated[dict[Name, ShardDescription], Field(min_length=1)]

    @model_validator(mode="after")
    def _relations(self) -> Self:
        if (self.embedder == "http") != bool(self.embedder_model):
            raise ValueError("embedder: http and embedder_model go together")
        if self.embedder == "local" and self.length not in LOCAL_DIMENSIONS:
            raise ValueError(f"dimensions must be one of {LOCAL_DIMENSIONS} with embedder: local")
        if not 1 <= self.length <= MAX_DIMENSIONS[self.precision]:
            raise ValueError(f"dimensions must be 1 to {MAX_DIMENSIONS[self.precision]}")
        return self

    @property
    def length(self) -> int:
        """Length of an embedding."""
        return self.dimensions or (LOCAL_DIMENSIONS[-1] if self.embedder == "local" else 1536)

    @property
    def model(self) -> str:
        """The model's name in the catalog; empty when callers bring embeddings."""
        return local_model_name(self.length) if self.embedder == "local" else self.embedder_model or ""

    def topology_shards(self) -> list[Shard]:
        """The shards, as the catalog has them."""
        return [
            Shard(
                shard_id,
                shard.address,
                shard.weight,
                replicas=tuple(Replica(name, address) for name, address in sorted(shard.replicas.items())),
            )
            for shard_id, shard in self.shards.items()
        ]


@dataclass(frozen=True, slots=True)
class Provisioned:
    """What became of the catalog."""

    cluster_id: str
    epoch: int
    made: bool
    """It is new."""
    told: tuple[str, ...] = ()
    """Shards whose address or replicas had changed."""
    missing: tuple[str, ...] = ()
    """Shards of the description that the cluster does not have: it has its slots with others already."""


def read_description(file: Path) -> ClusterDescription:
    """Raises DescriptionError."""
    try:
        return ClusterDescription.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError) as error:
        raise DescriptionError(f"{file}: {getattr(error, 'strerror', None) or 'is no text'}") from error
    except yaml.YAMLError as error:
        raise DescriptionError(f"{file}: not YAML: {error}") from error
    except ValidationError as error:
        problems = (f"{'.'.join(map(str, e['loc'])) or 'cluster'}: {e['msg']}" for e in error.errors())
        raise DescriptionError(f"{file}: {'; '.join(problems)}") from error


@dataclass(frozen=True, slots=True)
class Logins:
    """The roles of a server. Without a password for it there is no mover, or nobody for standbys to stream as."""

    owner: Login
    app: Login
    mover: Login | None = None
    replication: Login | None = None


async def prepare_catalog_server(server: Connection, logins: Logins) -> None:
    """Roles and an empty database for the catalog. `server` is a superuser's connection to any database of it."""
    for login in (logins.owner, logins.app, logins.mover):
        if login is not None:
            await roles.ensure_login(server, login)
    await roles.ensure_database(server, roles.CATALOG_DATABASE, logins.owner.role)


async def prepare_shard_server(server: Connection, logins: Logins) -> None:
    """Roles and an empty database for a shard. As above."""
    for login in (logins.owner, logins.app):
        await roles.ensure_login(server, login)
    for replicates in (logins.mover, logins.replication):
        if replicates is not None:
            await roles.ensure_login(server, replicates, replication=True)
    await roles.ensure_database(server, roles.SHARD_DATABASE, logins.owner.role)


async def prepare_catalog_database(database: Connection) -> None:
    """Inside the database that `prepare_catalog_server` has made, as a superuser."""
    await roles.close_database(database)


async def prepare_shard_database(database: Connection) -> None:
    """Inside the database that `prepare_shard_server` has made, as a superuser: pgvector, and what the shard's service
    needs to keep its standbys, and the mover to move slots."""
    await roles.close_database(database)
    await roles.ensure_vector(database)
    await roles.let_keep_standbys(database)
    if await roles.has_role(database, roles.MOVER):
        await roles.let_move_slots(database)


async def provision_catalog(owner_dsn: str, description: ClusterDescription, app: str = roles.APP) -> Provisioned:
    """Makes the catalog in its database, or brings addresses, tables and the rights of `app` up to date.

    Raises DatabaseUnreachableError; CatalogError when it holds another cluster than the one described.
    """
    connection = await postgres.connect(owner_dsn, what="the catalog")
    try:
        await catalog.upgrade(connection)
        made = await _make(connection, description)
        cluster = await catalog.read_cluster(connection)
        _require_same(cluster, description)
        await roles.let_read(connection, app)
        await roles.let_keep_sync_sets(connection, app)
        await roles.let_set_levels(connection, app)
        if await roles.has_role(connection, roles.MOVER):
            await roles.let_keep_moves(connection)
        for shard_id, shard in description.shards.items():
            if shard.primary_server:
                await catalog.create_sync_set(connection, shard_id, SyncSet(shard.primary_server, frozenset()))
        return await _tell(connection, description, made=made)
    finally:
        await connection.close()


async def _make(connection: Connection, description: ClusterDescription) -> bool:
    """Whether there was no cluster yet."""
    try:
        await catalog.read_cluster(connection)
    except CatalogError:
        await catalog.create(
            connection,
            description.topology_shards(),
            embedding_model=description.model,
            dimensions=description.length,
            precision=description.precision,
            placement=description.placement,
            text_language=description.text_language,
        )
        return True
    return False


def _require_same(cluster: Cluster, described: ClusterDescription) -> None:
    pairs = {
        "embedding model": (cluster.embedding_model, described.model),
        "dimensions": (cluster.dimensions, described.length),
        "precision": (cluster.precision, described.precision),
        "placement": (cluster.placement, described.placement),
        "text_language": (cluster.text_language, described.text_language),
    }
    other = [f"{name} {is_!s}, not {wanted!s}" for name, (is_, wanted) in pairs.items() if is_ != wanted]
    if other:
        raise CatalogError(
            f"this catalog holds a cluster with {'; '.join(other)}. They are fixed when a cluster is made: correct the "
            "description, or make another cluster and import into it"
        )


async def _tell(connection: Connection, description: ClusterDescription, *, made: bool) -> Provisioned:
    for _ in range(_TRIES):
        topology = await catalog.read_topology(connection)
        try:
            told = await tell_addresses(connection, topology, description.topology_shards())
        except EpochConflictError:
            continue
        known = {shard.shard_id for shard in topology.shards}
        return Provisioned(
            cluster_id=topology.cluster_id,
            epoch=await catalog.read_epoch(connection),
            made=made,
            told=told,
            missing=tuple(shard_id for shard_id in description.shards if shard_id not in known),
        )
    raise CatalogError("the catalog keeps changing; the shards' addresses could not be written to it: try again")


async def tell_addresses(connection: Connection, topology: Topology, shards: Sequence[Shard]) -> tuple[str, ...]:
    """Writes down where shards and replicas are now, of those that the topology knows; the ids of those that moved.

    Raises EpochConflictError.
    """
    now = {shard.shard_id: shard for shard in shards}
    pairs = [(known, now[known.shard_id]) for known in topology.shards if known.shard_id in now]
    addresses = {shard.shard_id: shard.address for known, shard in pairs if known.address != shard.address}
    replicas = {shard.shard_id: shard.replicas for known, shard in pairs if set(known.replicas) != set(shard.replicas)}
    epoch = topology.epoch
    if addresses:
        epoch = await catalog.set_addresses(connection, epoch, addresses)
    if replicas:
        await catalog.set_replicas(connection, epoch, replicas)
    return tuple(sorted({*addresses, *replicas}))
