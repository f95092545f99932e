"""What is kept about a cluster from its making on, and how the options of an `up` meet it."""

import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, ValidationError

from common.catalog import DEFAULT_TEXT_LANGUAGE, MAX_DIMENSIONS, TEXT_LANGUAGE, PlacementStrategy, Precision
from common.local_model import LOCAL_DIMENSIONS, local_model_name
from local import weights
from local.errors import DataDirectoryError, OptionsError
from local.layout import Layout, write_atomically

Embedder = Literal["local", "http", "none"]

DEFAULT_SHARDS = 2
MAX_SHARDS = 64
DEFAULT_REPLICAS = 1
MAX_REPLICAS = 8
DEFAULT_DIMENSIONS = 1536
DEFAULT_LOCAL_DIMENSIONS = 256

_PASSWORD_BYTES = 24


class _Kept(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Record(_Kept):
    """What was chosen when the cluster was made, and the ports that it uses inside."""

    shards: int
    replicas: int = 0
    """Standbys of each shard. Clusters from before there were any have none."""
    weights: tuple[int, ...] = ()
    """Share of each shard in the slots beside the others'. Empty: all have the same."""
    embedder: Embedder
    embedder_model: str
    """The model's name in the catalog; empty when callers bring their own embeddings."""
    embedder_url: str | None = None
    """Where the `http` embedder is. The one choice that may change."""
    dimensions: int
    precision: Literal["half"] = "half"
    placement: PlacementStrategy = PlacementStrategy.USER_BASED
    text_language: str = DEFAULT_TEXT_LANGUAGE
    ports: dict[str, int] = {}
    """Port of every process but the routers, and of what the routers have beside theirs, by name."""
    members: tuple[str, ...] = ()
    """The shards that there are, once one has come or left. Empty: those that the cluster was made with."""
    numbered: int = 0
    """How many shards have ever had a number, once one has come or left: no name is used twice."""
    complete: bool = False
    """Whether making it came to its end. Until then nobody has stored anything in it."""

    def shard_ids(self) -> list[str]:
        """The shards' names, in order."""
        return list(self.members) or [f"shard-{number}" for number in range(self.shards)]

    def with_new_shard(self) -> tuple["Record", str]:
        """The record with one shard more, and its name."""
        number = self.numbered or self.shards
        name = f"shard-{number}"
        return self.model_copy(update={"members": (*self.shard_ids(), name), "numbered": number + 1}), name

    def without_shard(self, shard_id: str) -> "Record":
        """The record with one shard less."""
        left = tuple(name for name in self.shard_ids() if name != shard_id)
        return self.model_copy(update={"members": left, "numbered": self.numbered or self.shards})

    def server_names(self, shard_id: str) -> list[str]:
        """Names of a shard's PostgreSQL servers. They outlive the servers' roles: any of them may be the primary."""
        return [f"postgres-{shard_id}", *(f"postgres-{shard_id}-{number}" for number in self._numbers())]

    def replica_names(self, shard_id: str) -> list[str]:
        """Names of a shard's replica services, one for each standby."""
        return [f"{shard_id}-replica-{number}" for number in self._numbers()]

    def _numbers(self) -> range:
        return range(1, self.replicas + 1)

    def weight_of(self, shard_id: str) -> int:
        """A shard's share of the slots beside the others', of those that the cluster was made with; 1 for others, whose
        share only the catalog knows.
        """
        made_with = {f"shard-{number}": share for number, share in enumerate(self.shares())}
        return made_with.get(shard_id, 1)

    def shares(self) -> tuple[int, ...]:
        """All of them, in the order of the shards that the cluster was made with."""
        return self.weights or (1,) * self.shards

    def save(self, layout: Layout) -> None:
        """Writes it, durably."""
        write_atomically(layout.record, self.model_dump_json(indent=2) + "\n", durable=True)


class Secrets(_Kept):
    """The passwords: of PostgreSQL's roles, and of Redis."""

    postgres: str
    memshard_owner: str
    memshard_app: str
    memshard_replication: str = ""
    """Empty in the file of a cluster from before there were standbys, until it is next started."""
    memshard_mover: str = ""
    """Empty in the file of a cluster from before slots could move, until it is next started."""
    redis: str

    @classmethod
    def generate(cls) -> "Secrets":
        """New random passwords, of letters that need no quoting in URLs, SQL and configuration files."""
        return cls(**{name: _password() for name in cls.model_fields})

    def completed(self) -> "Secrets":
        """These, with new ones for what an earlier version did not have."""
        later = ("memshard_replication", "memshard_mover")
        return self.model_copy(update={name: _password() for name in later if not getattr(self, name)})

    def save(self, layout: Layout) -> None:
        """Writes them, durably, for the owner only."""
        write_atomically(layout.secrets, self.model_dump_json(indent=2) + "\n", durable=True)

    def __repr__(self) -> str:
        """Without the passwords: a representation ends up in logs."""
        return "Secrets(…)"

    __str__ = __repr__


@dataclass(frozen=True, slots=True)
class Options:
    """The options of an `up`; None is "not given"."""

    shards: int | None = None
    replicas: int | None = None
    weights: str | None = None
    embedder: Embedder | None = None
    embedder_url: str | None = None
    embedder_model: str | None = None
    dimensions: int | None = None
    placement: PlacementStrategy | None = None
    text_language: str | None = None


def load_record(layout: Layout) -> Record:
    """Raises DataDirectoryError when there is no cluster, or its record cannot be read."""
    record = _load(layout.record, Record)
    # Shards come and leave in a finished cluster only. Some were written down as unfinished once, with all their data.
    return record.model_copy(update={"complete": True}) if record.members else record


def load_secrets(layout: Layout) -> Secrets:
    """Raises DataDirectoryError when the passwords cannot be read."""
    return _load(layout.secrets, Secrets)


def settle(options: Options, kept: Record | None) -> Record:
    """What the cluster is, or is to be: what is kept, when the options do not contradict it, else from the options.

    Raises OptionsError.
    """
    if kept is None:
        return _chosen(options)
    contradictions = [
        f"--{name.replace('_', '-')} {_shown(value)}, not {_shown(given)}"
        for name in ("shards", "replicas", "embedder", "embedder_model", "dimensions", "placement", "text_language")
        if (given := getattr(options, name)) is not None and given != (value := getattr(kept, name))
    ]
    if options.weights is not None and (given := weights.parse(options.weights)) != kept.shares():
        contradictions.append(f"--weights {weights.shown(kept.shares())}, not {weights.shown(given)}")
    if contradictions:
        raise OptionsError(
            f"this cluster was made with {'; '.join(contradictions)}. "
            "Drop the option to keep what it is, or make another cluster with another --data-dir"
        )
    _check_only_for_http(options, kept.embedder)
    _check_url(options.embedder_url)
    if options.embedder_url:
        return kept.model_copy(update={"embedder_url": options.embedder_url})
    return kept


def _chosen(options: Options) -> Record:
    embedder = options.embedder or "local"
    shares = () if options.weights is None else weights.parse(options.weights)
    shards = (len(shares) or DEFAULT_SHARDS) if options.shards is None else options.shards
    if not 1 <= shards <= MAX_SHARDS:
        raise OptionsError(f"--shards must be 1 to {MAX_SHARDS}")
    replicas = DEFAULT_REPLICAS if options.replicas is None else options.replicas
    if not 0 <= replicas <= MAX_REPLICAS:
        raise OptionsError(f"--replicas must be 0 to {MAX_REPLICAS}")
    if shares and len(shares) != shards:
        raise OptionsError(f"--weights {weights.shown(shares)}: there must be one for each of the {shards} shards")
    _check_only_for_http(options, embedder)
    if embedder == "http" and not (options.embedder_url and options.embedder_model):
        raise OptionsError("--embedder http needs --embedder-url and --embedder-model")
    _check_url(options.embedder_url)
    default = DEFAULT_LOCAL_DIMENSIONS if embedder == "local" else DEFAULT_DIMENSIONS
    dimensions = default if options.dimensions is None else options.dimensions
    if embedder == "local" and dimensions not in LOCAL_DIMENSIONS:
        raise OptionsError(
            f"--dimensions must be {', '.join(map(str, LOCAL_DIMENSIONS[:-1]))} or {LOCAL_DIMENSIONS[-1]} with the "
            "local embedder; other models: --embedder http, or --embedder none"
        )
    most = MAX_DIMENSIONS[Precision.HALF]
    if not 1 <= dimensions <= most:
        raise OptionsError(f"--dimensions must be 1 to {most}")
    model = {"local": local_model_name(dimensions), "http": options.embedder_model or "", "none": ""}[embedder]
    return Record(
        shards=shards,
        replicas=replicas,
        weights=shares,
        embedder=embedder,
        embedder_model=model,
        embedder_url=options.embedder_url,
        dimensions=dimensions,
        placement=options.placement or PlacementStrategy.USER_BASED,
        text_language=_text_language(options.text_language),
    )


def _password() -> str:
    return secrets.token_urlsafe(_PASSWORD_BYTES)


def _text_language(given: str | None) -> str:
    if given is not None and not TEXT_LANGUAGE.fullmatch(given):
        raise OptionsError("--text-language must be a PostgreSQL text search configuration, like english or simple")
    return given or DEFAULT_TEXT_LANGUAGE


def _check_url(url: str | None) -> None:
    if url is None:
        return
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        usable = False
    if not usable:
        raise OptionsError("--embedder-url must be a URL, like https://api.example.com/v1")


def _check_only_for_http(options: Options, embedder: Embedder) -> None:
    if embedder != "http" and (options.embedder_url or options.embedder_model):
        raise OptionsError("--embedder-url and --embedder-model go with --embedder http only")


def _shown(value: object) -> str:
    return str(value) if value != "" else "(none)"


_K = TypeVar("_K", bound=_Kept)


def _load(path: Path, model: type[_K]) -> _K:
    try:
        return model.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataDirectoryError(f"{path} is missing") from error
    except OSError as error:
        raise DataDirectoryError(f"{path}: {error.strerror}; are you the user who made this cluster?") from error
    except (ValidationError, UnicodeDecodeError) as error:
        raise DataDirectoryError(f"{path} is damaged, or from a newer version of memshard") from error
