"""Settings files and environment of the services, as the embedded cluster runs them."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from common.config import SETTINGS
from local.layout import Layout, write_atomically
from local.leftovers import MARK
from local.ports import HOST
from local.record import Record

Service = Literal["router", "shard", "replica"]

_EMBEDDER_KEY = "MEMSHARD_ROUTER_EMBEDDER_API_KEY"

# Below the bound after which the supervisor kills a service that does not end.
DRAIN_TIMEOUT_S = 10.0


def shard_settings(
    record: Record,
    shard_id: str,
    port: int,
    *,
    metrics_port: int,
    data: Path,
    database: str,
    migration: str,
    catalog: str,
) -> dict[str, Any]:
    """A shard's settings; `data` is where its servers have their directories, and the others are URLs."""
    return {
        **_common(port, metrics_port, catalog),
        "shard_id": shard_id,
        "database_dsn": database,
        "migration_dsn": migration,
        "data_path": str(data),
        **_embedder(record),
    }


def replica_settings(shard_id: str, port: int, *, metrics_port: int, database: str, catalog: str) -> dict[str, Any]:
    """A replica's settings; the last two are URLs."""
    return {**_common(port, metrics_port, catalog), "shard_id": shard_id, "database_dsn": database}


def router_settings(
    record: Record, port: int, *, metrics_port: int, admin_port: int, admin_token: Path, catalog: str, redis: str
) -> dict[str, Any]:
    """A router's settings; the last two are URLs."""
    return {
        **_common(port, metrics_port, catalog),
        "redis_url": redis,
        "admin_port": admin_port,
        "admin_token_file": str(admin_token),
        **_embedder(record),
    }


def mover_settings(*, catalog: str, shards: Mapping[str, str]) -> dict[str, Any]:
    """The mover's settings; `shards` are the URLs of their databases."""
    return {"catalog_dsn": catalog, "shard_dsns": dict(shards), "log_format": "json"}


def write_settings(layout: Layout, name: str, settings: Mapping[str, Any]) -> Path:
    """Writes a service's settings, which hold passwords; returns the file."""
    file = layout.settings(name)
    write_atomically(file, yaml.safe_dump(dict(settings), sort_keys=False), durable=False)
    return file


def environment(service: Service | Literal["mover"], settings: Mapping[str, Any], root: Path) -> dict[str, str]:
    """A service's environment: ours, with the mark, and without what would override its file.

    What the file does not say, like the key of an embedder, the person may give in the environment.
    """
    prefix = SETTINGS[service].model_config.get("env_prefix", "")
    overriding = {f"{prefix}{name}".upper() for name in settings}
    kept = {name: value for name, value in os.environ.items() if name.upper() not in overriding}
    # One key for both: the router embeds at once, the shard what had to wait.
    key = os.environ.get(_EMBEDDER_KEY)
    shared = {f"{prefix}EMBEDDER_API_KEY": key} if key else {}
    return {**shared, **kept, "PYTHONUNBUFFERED": "1", MARK: str(root)}


def handover_variable(service: Service) -> str:
    """Variable of a service's setting `handover_file`."""
    return f"{SETTINGS[service].model_config.get('env_prefix', '')}HANDOVER_FILE"


def write_metrics_targets(layout: Layout, ports: Mapping[str, Mapping[str, int]], shards: Mapping[str, str]) -> None:
    """Writes where the services have their metrics, for Prometheus' file_sd_configs: `ports` by what they are and by
    name, and by name the shard of each that is of one, so that this is known also when it does not answer.
    """
    of_shard = {name: {"shard": shard_id} for name, shard_id in shards.items()}
    targets = [
        {
            "targets": [f"{HOST}:{port}"],
            "labels": {"job": f"memshard-{role}", "service": name, **of_shard.get(name, {})},
        }
        for role, named in ports.items()
        for name, port in named.items()
    ]
    write_atomically(layout.metrics_targets, json.dumps(targets, indent=2) + "\n", durable=False)
    # Nothing in it is secret, and Prometheus runs as somebody else.
    layout.metrics_targets.chmod(0o644)


def _common(port: int, metrics_port: int, catalog: str) -> dict[str, Any]:
    return {
        "host": HOST,
        "port": port,
        "metrics_host": HOST,
        "metrics_port": metrics_port,
        "catalog_dsn": catalog,
        "log_format": "json",
        "drain_timeout_s": DRAIN_TIMEOUT_S,
    }


def _embedder(record: Record) -> dict[str, Any]:
    if record.embedder != "http":
        return {"embedder": record.embedder}
    return {"embedder": "http", "embedder_url": record.embedder_url, "embedder_model": record.embedder_model}
