"""Settings of the services: read once at the edge from environment and YAML, typed, checked, frozen.

A setting `catalog_dsn` of the router comes from `MEMSHARD_ROUTER_CATALOG_DSN`, else from the YAML file, else from its
default. Every field says its meaning, unit and the reason of its default; `memshard config generate` prints them.
"""

import os
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar
from urllib.parse import urlsplit

import yaml
from pydantic import AfterValidator, Field, SecretStr, ValidationError, model_validator
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    YamlConfigSettingsSource,
)

from common.dsn import hosts
from common.moves import MAX_ROLLBACK_WINDOW_S

MIB = 1024 * 1024

# Variables that everything with OpenTelemetry knows. The exporters read others by themselves.
_STANDARD = {"OTEL_TRACES_EXPORTER": "traces_exporter", "OTEL_TRACES_SAMPLER_ARG": "traces_sample_ratio"}


class ConfigError(Exception):
    """The settings do not make a working service; the message names each field and what to do."""


def _postgres_dsn(value: SecretStr) -> SecretStr:
    if not value.get_secret_value().startswith(("postgresql://", "postgres://")):
        raise ValueError("must be a PostgreSQL URL, like postgresql://user:password@host:5432/database")
    try:
        hosts(value.get_secret_value())
    except ValueError:
        # Without the cause, whose text quotes part of the password.
        raise ValueError(
            "cannot be taken apart; in a password, characters like / : @ # must be percent-encoded"
        ) from None
    return value


def _redis_url(value: SecretStr) -> SecretStr:
    if not value.get_secret_value().startswith(("redis://", "rediss://", "unix://")):
        raise ValueError("must be a Redis URL, like redis://:password@host:6379/0")
    return value


def _http_url(value: str) -> str:
    try:
        parts = urlsplit(value)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # Its text quotes the URL, which may hold a password.
        usable = False
    if not usable:
        raise ValueError("must be a URL, like https://api.example.com/v1")
    return value


def _webhook_url(value: SecretStr) -> SecretStr:
    _http_url(value.get_secret_value())
    return value


PostgresDsn = Annotated[SecretStr, AfterValidator(_postgres_dsn)]
RedisUrl = Annotated[SecretStr, AfterValidator(_redis_url)]
HttpUrl = Annotated[str, AfterValidator(_http_url)]
WebhookUrl = Annotated[SecretStr, AfterValidator(_webhook_url)]
Port = Annotated[int, Field(ge=1, le=65535)]
Seconds = Annotated[float, Field(gt=0, le=86400)]


class ProcessSettings(BaseSettings):
    """What every process of ours needs, whether it serves or does one thing and ends."""

    model_config = SettingsConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    catalog_dsn: PostgresDsn
    """URL of the catalog's database. A role that can only read is enough, but for setting levels through a router."""

    log_format: Literal["json", "console"] = "json"
    """`json`: one object a line, for collectors. `console`: for eyes."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe level that is logged."""

    metrics_port: Port | None = None
    """TCP port of `/metrics`, for Prometheus. None: there is none."""

    metrics_host: str = "127.0.0.1"
    """Address that `/metrics` listens on. Loopback by default, whatever `host` is: it asks nobody for a password."""

    traces_exporter: Literal["none", "otlp", "console", "jaeger"] = "none"
    """Where traces go. OpenTelemetry's own variable OTEL_TRACES_EXPORTER is heard as well. `otlp`: to
    OTEL_EXPORTER_OTLP_ENDPOINT, by gRPC (http://localhost:4317). `console`: into the log. `jaeger`: to an agent from
    before Jaeger took OTLP, at OTEL_EXPORTER_JAEGER_AGENT_HOST; needs the extra `jaeger`."""

    traces_sample_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of the traces that begin here that is kept. Who calls with a trace decides for it. Heard as
    OTEL_TRACES_SAMPLER_ARG as well."""

    traces_slow_s: Seconds = 0.5
    """Seconds from which on a call is kept as a trace though it was not sampled, as those are in which something
    failed. Ten a second at most."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Environment before file; no `.env`, which would be read from wherever the process happens to start."""
        yaml_file = cls.model_config.get("yaml_file")
        standard = {setting: value for name, setting in _STANDARD.items() if (value := os.environ.get(name))}
        return (
            init_settings,
            env_settings,
            InitSettingsSource(settings_cls, standard),
            *([YamlConfigSettingsSource(settings_cls)] if yaml_file else []),
        )


class ServiceSettings(ProcessSettings):
    """What every service needs."""

    host: str = "127.0.0.1"
    """Address to listen on. Loopback by default: the wire is not encrypted; 0.0.0.0 in a container."""

    port: Port
    """TCP port to listen on."""

    max_message_bytes: Annotated[int, Field(ge=MIB, le=1024 * MIB)] = 16 * MIB
    """Largest request taken, in bytes. A batch of the contract has at most 8 MiB; the rest is room to refuse a larger
    one with an error that names the field."""

    drain_timeout_s: Seconds = 10.0
    """Seconds that calls in flight get to finish after SIGTERM. Below the 30 s that Kubernetes waits before SIGKILL."""

    max_connection_age_s: Seconds | None = None
    """Seconds after which a client's connection is closed in order, calls under way being finished, so that clients
    that balance by DNS look again and find servers that have come since. None: never."""

    handover_file: Path | None = None
    """File that is made once this process listens, on ports that a predecessor still listens on: the predecessor may be
    ended then, and a service is restarted without a pause. None: ports that are in use are an error."""

    @model_validator(mode="after")
    def _own_port_for_metrics(self) -> Self:
        if self.metrics_port == self.port:
            raise ValueError("metrics_port must be another than port")
        return self


class EmbedderSettings(ServiceSettings):
    """What a service needs that turns text into embeddings: the router at once, the shard what had to wait."""

    embedder: Literal["local", "http", "none"] = "local"
    """Who turns text into embeddings. `local`: the model in the wordllama wheel. `http`: a server with an
    OpenAI-compatible /embeddings. `none`: callers bring embeddings."""

    embedder_url: HttpUrl | None = None
    """Base URL of the `http` embedder, like https://api.example.com/v1."""

    embedder_model: str | None = None
    """Model to ask the `http` embedder for. Must be the cluster's; None: whatever the cluster was created with."""

    embedder_api_key: SecretStr | None = None
    """Bearer token for the `http` embedder."""

    embedder_timeout_s: Seconds = 5.0
    """Seconds that one exchange with the `http` embedder may take."""

    @model_validator(mode="after")
    def _embedder_relations(self) -> Self:
        if self.embedder == "http" and not self.embedder_url:
            raise ValueError("embedder_url is required with embedder: http")
        return self


class RouterSettings(EmbedderSettings):
    """The router's settings: environment prefix `MEMSHARD_ROUTER_`."""

    model_config = SettingsConfigDict(env_prefix="MEMSHARD_ROUTER_")

    port: Port = 50051
    """TCP port of the public API; gRPC's customary one."""

    redis_url: RedisUrl | None = None
    """URL of the shared location cache, and of the channel on which routers tell each other what to forget. None:
    nothing is remembered; slower, never wrong."""

    redis_timeout_s: Seconds = 0.05
    """Seconds to wait for Redis before going on without it. Asking all shards takes a few milliseconds, so waiting
    longer than 50 ms never pays."""

    default_deadline_s: Seconds = 10.0
    """Seconds for a call whose caller set no deadline."""

    shard_deadline_margin_s: Annotated[float, Field(ge=0, le=1)] = 0.02
    """Least seconds of the caller's budget that are kept back from the shard call, for the way back. Of a long budget a
    twentieth is, up to a quarter of a second."""

    fanout_concurrency: Annotated[int, Field(ge=1, le=1024)] = 32
    """Most shard calls that one fan-out has open at once."""

    catalog_poll_s: Seconds = 5.0
    """Seconds between looks at the catalog, in case a notification was lost."""

    location_cache_entries: Annotated[int, Field(ge=0, le=10_000_000)] = 100_000
    """Memory locations that this router remembers; about 200 bytes each."""

    location_cache_ttl_s: Seconds = 10.0
    """Seconds that this router remembers a location. Short, because other routers tell it what to forget, and not what
    they learn."""

    location_redis_ttl_s: Annotated[int, Field(ge=1, le=30 * 86400)] = 86400
    """Seconds that Redis remembers a location (the design's 24 h)."""

    memory_cache_bytes: Annotated[int, Field(ge=0, le=1024 * 1024 * MIB)] = 64 * MIB
    """Bytes of memories that this router remembers, for reads that need not be strong; some 45,000 of 500 bytes each.
    Needs `redis_url`, by which routers tell each other what to forget. 0: none."""

    memory_cache_ttl_s: Seconds = 300.0
    """Seconds that this router remembers a memory (the design's 5 minutes)."""

    memory_redis_ttl_s: Annotated[int, Field(ge=0, le=7 * 86400)] = 3600
    """Seconds that Redis remembers a memory that a router has read (the design's hour). 0: it does not."""

    search_cache_bytes: Annotated[int, Field(ge=0, le=1024 * 1024 * MIB)] = 32 * MIB
    """Bytes of search results that this router remembers, for as long as memories. 0: none."""

    embedding_cache_bytes: Annotated[int, Field(ge=0, le=1024 * 1024 * MIB)] = 16 * MIB
    """Bytes of embeddings of searched texts that this router remembers, with `embedder: http`. 0: none."""

    embedding_cache_ttl_s: Annotated[int, Field(ge=0, le=30 * 86400)] = 7 * 86400
    """Seconds that an embedding is remembered that the `http` embedder has made, here and in Redis (the design's 7
    days). Those of stored texts are in Redis alone, by user, and erased with the user. 0: none is."""

    reads: Literal["replicas", "all"] = "replicas"
    """Who serves reads that need not be strong. `replicas`: the primary only when no replica can. `all`: the primary
    takes its share."""

    freshness_wait_s: Annotated[float, Field(ge=0, le=10)] = 0.05
    """Seconds that a replica which is behind may wait before the read goes elsewhere. Replay usually takes a few
    milliseconds."""

    replica_timeout_s: Seconds = 0.25
    """Seconds that a replica gets for a read before it goes elsewhere. Reads of one user take a few milliseconds."""

    replica_poll_s: Seconds = 0.25
    """Seconds between looks at each replica, so that one that comes or goes is noticed within a second."""

    admin_port: Port | None = None
    """TCP port of ClusterService, by which operators look at the router and have it recover. None: there is none."""

    admin_host: str = "127.0.0.1"
    """Address that ClusterService listens on. Loopback by default, whatever `host` is."""

    admin_token_file: Path | None = None
    """File with the token that calls of ClusterService have to bring. Needed with `admin_port`."""

    alert_webhook_url: WebhookUrl | None = None
    """URL that alerts are posted to as JSON, one each. None: they are only in the log. It may hold a secret, as the
    URLs of chat services do."""

    alert_timeout_s: Seconds = 5.0
    """Seconds that the webhook gets for one alert, of which there are three attempts. Nothing else waits for it."""

    recovery: Literal["auto", "manual"] = "auto"
    """Who has the router try what may help against what its health monitor finds. `auto`: the router itself, when it
    has been so for 15 seconds. `manual`: whoever runs `memshard recover`."""

    @model_validator(mode="after")
    def _relations(self) -> Self:
        if self.admin_port is not None and self.admin_token_file is None:
            raise ValueError("admin_token_file is required with admin_port")
        if self.admin_port == self.port:
            raise ValueError("admin_port must be another than port")
        if self.admin_port is not None and self.admin_port == self.metrics_port:
            raise ValueError("metrics_port must be another than admin_port")
        if self.embedder_timeout_s > self.default_deadline_s:
            raise ValueError("embedder_timeout_s must not exceed default_deadline_s")
        if self.shard_deadline_margin_s >= self.default_deadline_s:
            raise ValueError("shard_deadline_margin_s must be less than default_deadline_s")
        return self


class ShardSettings(EmbedderSettings):
    """The shard's settings: environment prefix `MEMSHARD_SHARD_`."""

    model_config = SettingsConfigDict(env_prefix="MEMSHARD_SHARD_")

    port: Port = 50061
    """TCP port of the internal API."""

    max_message_bytes: Annotated[int, Field(ge=MIB, le=1024 * MIB)] = 32 * MIB
    """Largest request taken, in bytes. A batch of 8 MiB comes from the router with an embedding for each of its 500
    items, at most 16 KB each."""

    shard_id: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]
    """This shard's name in the catalog. A DNS label, so that it can name a Kubernetes Service too."""

    catalog_dsn: PostgresDsn
    """URL of the catalog's database. A role that can only read is enough, but for `sync_set: managed`: it has to be
    allowed UPDATE on `members`, `following` and `version` of `sync_sets`."""

    database_dsn: PostgresDsn
    """URL of the shard's own database, as a role that can only read and write rows. It may name several servers, as in
    postgresql://user:password@one:5432,two:5432/database: the service follows whichever of them takes writes."""

    migration_dsn: PostgresDsn | None = None
    """URL of the same database as the role that owns the schema, and with `sync_set: managed` may set
    synchronous_standby_names. None: `database_dsn` is used for both."""

    data_path: Path | None = None
    """Directory on the file system that holds the database's data, to watch how much room is left there. None: it is
    on another machine, and nobody watches from here."""

    pool_min_connections: Annotated[int, Field(ge=1, le=1000)] = 2
    """Connections kept open when idle."""

    pool_max_connections: Annotated[int, Field(ge=1, le=1000)] = 16
    """Most connections. PostgreSQL's throughput peaks near a few per core; more only wait inside it."""

    default_deadline_s: Seconds = 10.0
    """Seconds for a call that came without a deadline. Routers always send one."""

    lock_timeout_s: Annotated[float, Field(ge=0.1, le=60)] = 3.0
    """Seconds that a write waits for a slot that is being handed over, before it answers that it may be sent again."""

    tombstone_ttl_s: Annotated[int, Field(ge=60, le=30 * 86400)] = 86400
    """Seconds that a deleted memory's id and a request id are remembered (the contract's 24 h)."""

    purge_interval_s: Seconds = 60.0
    """Seconds between clean-ups of what is older than that, or expired."""

    version_ttl_s: Annotated[int, Field(ge=0, le=3650 * 86400)] = 30 * 86400
    """Seconds that earlier versions of a memory are kept (30 days)."""

    embedding_interval_s: Seconds = 1.0
    """Seconds between looks for memories that were stored while the embedder was away."""

    page_bytes: Annotated[int, Field(ge=1024, le=64 * MIB)] = 3 * MIB
    """Bytes after which a page of a listing ends early. Below the 4 MiB that gRPC clients take by default."""

    own_index_memories: Annotated[int, Field(ge=100, le=10**9)] = 10_000
    """Memories with an embedding from which on a user gets an index of their own; below half as many it is dropped. An
    exact search takes about 10 ms for 10,000 memories."""

    own_index_most: Annotated[int, Field(ge=0, le=64)] = 16
    """Most users that have one, the largest; 0: nobody. PostgreSQL locks every index of a table for each statement that
    it plans."""

    shared_index: bool = False
    """One more index, of all memories, for searches that name no user, from `own_index_memories` on. Inserts are much
    dearer with it, and such searches find 99 of 100 that an exact one finds, by measurement
    (docs/decisions/0019-shared-index.md). Switched off, it is dropped."""

    own_index_interval_s: Seconds = 60.0
    """Seconds between looks for users who have become large. Where counting takes long they are fewer, so that it takes
    no more than a hundredth of the time."""

    own_index_build_mb: Annotated[int, Field(ge=8, le=65536)] = 256
    """MiB that the graph of an index may take while it is made (`maintenance_work_mem`). 100,000 memories take 150 with
    384 numbers each; what does not fit takes several times as long."""

    heartbeat_interval_s: Annotated[float, Field(ge=0.05, le=60)] = 0.5
    """Seconds between heartbeats in the log, by which replicas know how old what they have is."""

    sync_set: Literal["managed", "external"] = "managed"
    """Who decides which standbys commits wait for. `managed`: this service, with the catalog, where the catalog keeps
    a sync set for the shard. `external`: whoever runs PostgreSQL (CloudNativePG, Patroni); receipts follow its
    setting."""

    on_standby_loss: Literal["degrade", "refuse"] = "degrade"
    """What becomes of writes when too few standbys are left. `degrade`: they are acknowledged as LOCAL. `refuse`: they
    wait."""

    standby_loss_s: Annotated[float, Field(ge=0.5, le=300)] = 2.0
    """Seconds without a flush, while a commit waits, after which a standby counts as lost."""

    primary_wait_s: Seconds = 5.0
    """Seconds that a call waits for a server that takes writes, while one is being promoted."""

    @model_validator(mode="after")
    def _relations(self) -> Self:
        if self.pool_min_connections > self.pool_max_connections:
            raise ValueError("pool_min_connections must not exceed pool_max_connections")
        return self


class ReplicaSettings(ServiceSettings):
    """The replica's settings: environment prefix `MEMSHARD_REPLICA_`."""

    model_config = SettingsConfigDict(env_prefix="MEMSHARD_REPLICA_")

    port: Port = 50071
    """TCP port of the internal API."""

    shard_id: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]
    """Name in the catalog of the shard whose standby this is."""

    database_dsn: PostgresDsn
    """URL of the standby's database, as the role that the shard's service has too."""

    pool_min_connections: Annotated[int, Field(ge=1, le=1000)] = 2
    """Connections kept open when idle."""

    pool_max_connections: Annotated[int, Field(ge=1, le=1000)] = 16
    """Most connections, as for a shard."""

    default_deadline_s: Seconds = 10.0
    """Seconds for a call that came without a deadline. Routers always send one."""

    max_lag_s: Seconds = 30.0
    """Seconds behind its primary beyond which it says NOT_SERVING, and no router asks it anything."""

    page_bytes: Annotated[int, Field(ge=1024, le=64 * MIB)] = 3 * MIB
    """Bytes after which a page of a listing ends early, as for a shard."""

    @model_validator(mode="after")
    def _relations(self) -> Self:
        if self.pool_min_connections > self.pool_max_connections:
            raise ValueError("pool_min_connections must not exceed pool_max_connections")
        return self


# A mover at work has ended its fence, or given it up, long before.
_HUNG_AFTER_FENCES = 3
_FENCE_TIMEOUT_S = 5.0
MOVER_HUNG_AFTER_S = _HUNG_AFTER_FENCES * _FENCE_TIMEOUT_S
"""`MoverSettings.hung_after_s` of a mover whose settings say nothing of it."""


class MoverSettings(ProcessSettings):
    """The mover's settings: environment prefix `MEMSHARD_MOVER_`. It moves slots between shards, and ends."""

    model_config = SettingsConfigDict(env_prefix="MEMSHARD_MOVER_")

    catalog_dsn: PostgresDsn
    """URL of the catalog's database, as a role that may change the topology and the moves."""

    shard_dsns: dict[str, PostgresDsn] = {}
    """URL of each shard's database by the shard's name, as the role of the mover; in the environment a JSON object. It
    may name several servers. Shards reach each other by it too, to replicate what moves."""

    shard_dsn_template: PostgresDsn | None = None
    """URL for every shard that `shard_dsns` does not name, with {shard_id} where the shard's name goes, as in
    postgresql://memshard_mover:password@{shard_id}-rw:5432/memshard."""

    fence_timeout_s: Annotated[float, Field(ge=0.5, le=60)] = _FENCE_TIMEOUT_S
    """Seconds that the slots of a move may take no writes. A move that would take longer gives them back, and tries
    again later."""

    concurrency: Annotated[int, Field(ge=1, le=8)] = 2
    """Most moves that are under way at once."""

    max_slots: Annotated[int, Field(ge=1, le=16384)] = 1024
    """Most slots that one move takes. Fewer make each pause shorter, and all of it longer."""

    rollback_window_s: Annotated[float, Field(ge=0, le=MAX_ROLLBACK_WINDOW_S)] = 30.0
    """Seconds after a range has moved during which it can be brought back with all that was written since. The source
    keeps its rows until then. A move is made with it: whoever resumes it keeps to what is recorded."""

    max_rate: Annotated[int, Field(ge=0)] = 0
    """Most rows a second that are copied, on average over the moves; 0: as many as the servers can."""

    max_standby_lag_bytes: Annotated[int, Field(ge=MIB)] = 64 * MIB
    """How far the standbys of source or target may be behind before a move waits for them: with its copy, with the way
    back, with what is compared and removed next."""

    own_index_build_mb: Annotated[int, Field(ge=8, le=65536)] = 256
    """MiB that an index of a large user may take while it is made on the shard that the user goes to: as a shard's own
    setting of this name."""

    @model_validator(mode="after")
    def _relations(self) -> Self:
        template = self.shard_dsn_template
        if template is not None and "{shard_id}" not in template.get_secret_value():
            raise ValueError("shard_dsn_template must say {shard_id} somewhere")
        return self

    @property
    def hung_after_s(self) -> float:
        """Seconds after which a mover that has done nothing about a fence of its own is taken for one that hangs."""
        return _HUNG_AFTER_FENCES * self.fence_timeout_s

    def shard_dsn(self, shard_id: str) -> str:
        """URL of a shard's database. Raises ConfigError when none is known."""
        if (given := self.shard_dsns.get(shard_id)) is not None:
            return given.get_secret_value()
        if self.shard_dsn_template is None:
            raise ConfigError(f"shard_dsns has no URL for {shard_id}")
        return self.shard_dsn_template.get_secret_value().replace("{shard_id}", shard_id)


SETTINGS: dict[str, type[ProcessSettings]] = {
    "router": RouterSettings,
    "shard": ShardSettings,
    "replica": ReplicaSettings,
    "mover": MoverSettings,
}

S = TypeVar("S", bound=ProcessSettings)


def load(settings: type[S], file: Path | None = None) -> S:
    """Reads and checks the settings of a service from environment and, when given, a YAML file.

    Raises ConfigError naming every field at fault.
    """
    configured: type[S] = type(
        settings.__name__,
        (settings,),
        {
            "model_config": SettingsConfigDict(yaml_file=_checked(file) if file else None),
            "__module__": __name__,
        },
    )
    try:
        return configured()  # type: ignore[call-arg]  # The sources fill it.
    except ValidationError as error:
        prefix = settings.model_config.get("env_prefix", "")
        problems = [_problem(problem, prefix) for problem in error.errors()]
        where = f"{file}: " if file else ""
        raise ConfigError(f"{where}{'; '.join(problems)}") from None


def generate(settings: type[ProcessSettings]) -> str:
    """A YAML file with every setting, its documentation and its default."""
    lines = [f"# {(settings.__doc__ or '').strip()}"]
    for name, field in settings.model_fields.items():
        lines.append("")
        lines += [f"# {line.strip()}" for line in (field.description or "").splitlines()]
        if field.is_required():
            lines.append(f"{name}:  # required")
        else:
            value = yaml.safe_dump({name: field.default}, default_flow_style=False).strip()
            lines.append(f"# {value}")
    return "\n".join(lines) + "\n"


def _checked(file: Path) -> Path:
    """`file`, once it is known to be a YAML mapping: pydantic-settings ignores one that is missing."""
    try:
        document = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from error
    except UnicodeDecodeError:
        raise ConfigError(f"{file}: must be UTF-8") from None
    except yaml.YAMLError as error:
        # Where it breaks, but not in the parser's words: they quote the file, which has passwords.
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ConfigError(f"{file}: {where}not YAML; is a quote, a bracket or an indent amiss?") from None
    if document is not None and not isinstance(document, dict):
        raise ConfigError(f"{file}: must be a mapping of settings, not a {type(document).__name__}")
    for name in document or ():
        if not isinstance(name, str):
            raise ConfigError(f"{file}: {name!r} is no setting of this service")
    return file


def _problem(problem: ErrorDetails, prefix: str) -> str:
    name = ".".join(str(part) for part in problem["loc"])
    # A setting without a value, as `generate` leaves the required ones, is a missing one.
    if problem["type"] == "missing" or (problem["type"].endswith("_type") and problem.get("input") is None):
        return f"{name} is required; set it in the file or as {prefix}{name.upper()}"
    if problem["type"] == "extra_forbidden":
        return f"{name} is no setting of this service"
    text = problem["msg"].removeprefix("Value error, ")
    return f"{name}: {text}" if name else text
