"""Load profiles: what is asked, of how much, how often, for how long. YAML, checked before anything starts."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

PROFILES = Path(__file__).parent / "profiles"
"""The profiles that come with memshard."""

_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class ProfileError(Exception):
    """The profile cannot be used; the message names every field at fault."""


class Operation(StrEnum):
    """What is asked of the service."""

    STORE = "store"
    BATCH = "batch"
    GET = "get"
    LOCATE = "locate"
    UPDATE = "update"
    DELETE = "delete"
    LIST = "list"
    VERSIONS = "versions"
    SEARCH = "search"
    SEARCH_ALL = "search_all"
    KEYWORD = "keyword"
    ERASE = "erase"


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Data(_Model):
    """What is there before the first call. The same profile finds it stored already, and stores nothing twice."""

    users: Annotated[int, Field(ge=1, le=1_000_000)] = 20
    """How many users have memories."""

    memories: Annotated[int, Field(ge=1, le=1_000_000)] = 50
    """How many each of them has."""

    content_bytes: Annotated[int, Field(ge=16, le=64 * 1024)] = 200
    """Length of a memory's text."""

    dimensions: Annotated[int, Field(ge=1, le=4000)] | None = None
    """Length of the embeddings that callers bring, which has to be the cluster's. None: the cluster embeds texts."""

    zipf: Annotated[float, Field(gt=0, le=5)] | None = None
    """Exponent s of Zipf's law, by which some memories are asked for more often than others: the one of rank r with
    1 / r ** s. None: all alike."""


class Limits(_Model):
    """What must hold in the end, or the command fails."""

    errors: Annotated[float, Field(ge=0, le=1)] | None = None
    """Largest share of calls that may fail."""

    p99_ms: dict[Operation, _Positive] = {}
    """Milliseconds that 99 of 100 successful calls of an operation take at most."""

    cache_hit_ratio: Annotated[float, Field(gt=0, le=1)] | None = None
    """Least share of reads that caches answer."""

    levels: Literal["normal"] | None = None
    """normal: no answer comes under a degradation level."""


class Profile(_Model):
    """One load."""

    name: str = ""
    """What the report calls it."""

    operations: dict[Operation, _Positive]
    """What is asked, with weights: {search: 80, store: 20}."""

    data: Data = Data()

    concurrency: Annotated[int, Field(ge=1, le=10_000)] | None = None
    """Callers, each of whom makes one call after the other; with a rate, how many calls may be under way at once."""

    rate: Annotated[float, Field(gt=0, le=1_000_000)] | None = None
    """Calls a second, begun at their time whatever became of those before. What a call waits for a free caller counts
    as its latency."""

    arrivals: Literal["poisson", "even"] = "poisson"
    """With a rate: at random times, as of many independent callers, or at equal distances."""

    duration_s: Annotated[float, Field(gt=0, le=7 * 86_400)] = 10.0
    """Seconds that are measured."""

    warm_up_s: Annotated[float, Field(ge=0, le=3600)] = 1.0
    """Seconds of the same load before, which are not."""

    processes: Annotated[int, Field(ge=1, le=64)] = 2
    """Processes that make the calls, so that they are not what limits them."""

    timeout_s: _Positive = 10.0
    """Deadline of each call in seconds."""

    limit: Annotated[int, Field(ge=1, le=1000)] = 10
    """Results of a search, and memories of a page."""

    batch: Annotated[int, Field(ge=1, le=500)] = 50
    """Memories in a batch."""

    read: Literal["strong", "session", "eventual"] = "strong"
    """How fresh reads are. SESSION is the client's own way; stubs send no token, so that there it is EVENTUAL."""

    seed: int = 0
    """Another seed has other users, texts and embeddings."""

    limits: Limits = Limits()

    @model_validator(mode="after")
    def _relations(self) -> Self:
        if not self.operations:
            raise ValueError("operations must name at least one")
        if self.concurrency is None and self.rate is None:
            raise ValueError("give concurrency, or a rate, or both")
        if self.concurrency is not None and self.concurrency < self.processes:
            raise ValueError("concurrency must be at least processes: each of them has one caller or more")
        if unknown := self.limits.p99_ms.keys() - self.operations.keys():
            raise ValueError(f"limits.p99_ms names {', '.join(sorted(unknown))}, which is never asked")
        if self.limits.cache_hit_ratio is not None and self.read == "strong":
            raise ValueError("limits.cache_hit_ratio cannot hold with read: strong, which no cache answers")
        return self


def load(name: str) -> Profile:
    """The profile in a file, or one of `PROFILES` by its name ("agents"). Raises ProfileError."""
    file = Path(name)
    if not file.suffix and not file.exists() and (PROFILES / f"{name}.yaml").exists():
        file = PROFILES / f"{name}.yaml"
    try:
        document = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        there = ", ".join(sorted(found.stem for found in PROFILES.glob("*.yaml")))
        raise ProfileError(f"{name}: {error.strerror}; profiles that come with memshard: {there}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ProfileError(f"{name}: is not YAML: {error}") from error
    if not isinstance(document, dict):
        raise ProfileError(f"{name}: must be a mapping")
    return parse({"name": file.stem, **document}, name)


def parse(document: dict[str, object], where: str) -> Profile:
    """A profile from what a file says. Raises ProfileError."""
    try:
        return Profile.model_validate(document)
    except ValidationError as error:
        problems = [
            ".".join(map(str, problem["loc"])) + (": " if problem["loc"] else "") + problem["msg"]
            for problem in error.errors()
        ]
        raise ProfileError(f"{where}: {'; '.join(problems)}") from None
