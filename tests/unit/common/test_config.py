"""Settings: read from environment and file, checked as a whole, and every complaint names its field but no secret."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from common import config
from common.config import (
    ConfigError,
    MoverSettings,
    ProcessSettings,
    ReplicaSettings,
    RouterSettings,
    ShardSettings,
    generate,
    load,
)

_SECRET = "hunter2"
_DSN = f"postgresql://agent:{_SECRET}@db:5432/memshard"
_REQUIRED: dict[type[ProcessSettings], dict[str, Any]] = {
    RouterSettings: {"catalog_dsn": _DSN},
    ShardSettings: {"catalog_dsn": _DSN, "shard_id": "shard-1", "database_dsn": _DSN},
    ReplicaSettings: {"catalog_dsn": _DSN, "shard_id": "shard-1", "database_dsn": _DSN},
    MoverSettings: {"catalog_dsn": _DSN},
}


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MEMSHARD_ROUTER_", "MEMSHARD_SHARD_", "MEMSHARD_REPLICA_", "MEMSHARD_MOVER_"):
        for field in {field for service in _REQUIRED for field in service.model_fields}:
            monkeypatch.delenv(name + field.upper(), raising=False)


def _written(tmp_path: Path, settings: dict[Any, Any] | str) -> Path:
    file = tmp_path / "settings.yaml"
    file.write_text(settings if isinstance(settings, str) else yaml.safe_dump(settings), encoding="utf-8")
    return file


def _complaint(service: type[ProcessSettings], file: Path | None) -> str:
    with pytest.raises(ConfigError) as caught:
        load(service, file)
    assert _SECRET not in str(caught.value)
    assert _SECRET not in repr(caught.value)
    return str(caught.value)


def test_environment_comes_before_the_file_and_the_file_before_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = _written(tmp_path, {"catalog_dsn": _DSN, "port": 1111, "fanout_concurrency": 7})
    monkeypatch.setenv("MEMSHARD_ROUTER_PORT", "2222")
    settings = load(RouterSettings, file)
    assert (settings.port, settings.fanout_concurrency, settings.host) == (2222, 7, "127.0.0.1")


def test_environment_alone_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMSHARD_ROUTER_CATALOG_DSN", _DSN)
    monkeypatch.setenv("MEMSHARD_SHARD_PORT", "2222")  # Another service's.
    settings = load(RouterSettings)
    assert settings.catalog_dsn.get_secret_value() == _DSN
    assert settings.port == 50051


def test_file_is_read_from_where_it_is_named_and_nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".env").write_text(f"MEMSHARD_ROUTER_CATALOG_DSN={_DSN}\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert "catalog_dsn is required" in _complaint(RouterSettings, None)


def test_two_services_in_one_process_keep_their_own_files(tmp_path: Path) -> None:
    router = load(RouterSettings, _written(tmp_path, {"catalog_dsn": _DSN, "port": 1111}))
    shard = load(ShardSettings, _written(tmp_path, {**_REQUIRED[ShardSettings], "port": 2222}))
    assert (router.port, shard.port) == (1111, 2222)


@pytest.mark.parametrize(
    ("service", "change", "complaint"),
    [
        (RouterSettings, {"no_such_setting": 1}, "no_such_setting is no setting of this service"),
        (RouterSettings, {7: 1}, "7 is no setting of this service"),
        (RouterSettings, {"catalog_dsn": None}, "catalog_dsn"),
        (RouterSettings, {"catalog_dsn": _SECRET}, "catalog_dsn: must be a PostgreSQL URL"),
        (RouterSettings, {"catalog_dsn": f"mysql://root:{_SECRET}@db/x"}, "catalog_dsn: must be a PostgreSQL URL"),
        (RouterSettings, {"catalog_dsn": [_DSN]}, "catalog_dsn"),
        (RouterSettings, {"redis_url": _SECRET}, "redis_url: must be a Redis URL"),
        (RouterSettings, {"port": _SECRET}, "port: Input should be a valid integer"),
        (RouterSettings, {"port": 0}, "port: Input should be greater than or equal to 1"),
        (RouterSettings, {"port": 65536}, "port: Input should be less than or equal to 65535"),
        (RouterSettings, {"port": 1.5}, "port"),
        (RouterSettings, {"host": 5}, "host"),
        (RouterSettings, {"log_format": _SECRET}, "log_format: Input should be 'json' or 'console'"),
        (RouterSettings, {"log_level": "trace"}, "log_level"),
        (RouterSettings, {"drain_timeout_s": 0}, "drain_timeout_s"),
        (RouterSettings, {"drain_timeout_s": float("inf")}, "drain_timeout_s"),
        (RouterSettings, {"drain_timeout_s": float("nan")}, "drain_timeout_s"),
        (RouterSettings, {"max_message_bytes": 1024}, "max_message_bytes"),
        (RouterSettings, {"fanout_concurrency": 0}, "fanout_concurrency"),
        (RouterSettings, {"location_cache_entries": -1}, "location_cache_entries"),
        (RouterSettings, {"metrics_port": 50051, "port": 50051}, "metrics_port must be another than port"),
        (
            RouterSettings,
            {"admin_port": 9100, "admin_token_file": "token", "metrics_port": 9100},
            "metrics_port must be another than admin_port",
        ),
        (RouterSettings, {"embedder": "http"}, "embedder_url is required with embedder: http"),
        (RouterSettings, {"embedder": "http", "embedder_url": ""}, "embedder_url"),
        (RouterSettings, {"embedder": "http", "embedder_url": "api.example.com/v1"}, "embedder_url"),
        (RouterSettings, {"embedder": "http", "embedder_url": f"http://[{_SECRET}"}, "embedder_url"),
        (
            RouterSettings,
            {"embedder_timeout_s": 11.0, "embedder_api_key": _SECRET},
            "embedder_timeout_s must not exceed default_deadline_s",
        ),
        (
            RouterSettings,
            {"default_deadline_s": 0.5, "shard_deadline_margin_s": 0.5, "embedder_timeout_s": 0.1},
            "shard_deadline_margin_s must be less than default_deadline_s",
        ),
        (ShardSettings, {"shard_id": "Shard_1"}, "shard_id"),
        (ShardSettings, {"shard_id": "a" * 64}, "shard_id"),
        (ShardSettings, {"shard_id": "shard-1\n"}, "shard_id"),
        (ShardSettings, {"migration_dsn": _SECRET}, "migration_dsn: must be a PostgreSQL URL"),
        (
            ShardSettings,
            {"pool_min_connections": 17},
            "pool_min_connections must not exceed pool_max_connections",
        ),
    ],
)
def test_bad_setting_is_named(
    tmp_path: Path, service: type[ProcessSettings], change: dict[Any, Any], complaint: str
) -> None:
    file = _written(tmp_path, {**_REQUIRED[service], **change})
    assert complaint in (found := _complaint(service, file))
    assert str(file) in found


def test_every_fault_is_named_at_once(tmp_path: Path) -> None:
    complaint = _complaint(ShardSettings, _written(tmp_path, {"port": 0, "colour": "red"}))
    for part in (
        "catalog_dsn is required; set it in the file or as MEMSHARD_SHARD_CATALOG_DSN",
        "shard_id is required",
        "database_dsn is required",
        "port: ",
        "colour is no setting",
    ):
        assert part in complaint


def test_bad_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMSHARD_ROUTER_CATALOG_DSN", _SECRET)
    monkeypatch.setenv("MEMSHARD_ROUTER_PORT", "")
    complaint = _complaint(RouterSettings, None)
    assert "catalog_dsn: must be a PostgreSQL URL" in complaint
    assert "port: " in complaint


@pytest.mark.parametrize(
    "text",
    [
        f'catalog_dsn: "{_DSN}\n',
        f"catalog_dsn: {_DSN}\n  port: 1\n",
        f"catalog_dsn: {_DSN}\nport: [1\n",
        f"catalog_dsn: {_DSN}\nport: '\x01'\n",
        f"catalog_dsn: !!python/name:{_SECRET} x\n",
        f"catalog_dsn: *{_SECRET}\n",
        f"- {_DSN}\n",
        _DSN,
    ],
)
def test_file_that_is_no_mapping_is_refused_without_quoting_it(tmp_path: Path, text: str) -> None:
    file = _written(tmp_path, text)
    assert str(file) in _complaint(RouterSettings, file)


def test_broken_file_is_refused_with_the_place_of_the_fault(tmp_path: Path) -> None:
    file = _written(tmp_path, f"port: 1\ncatalog_dsn: {_DSN}\nhost: [1\n")
    assert "line 4" in _complaint(RouterSettings, file)


def test_file_in_another_encoding_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_bytes(b"host: \xff\xfe\n")
    assert str(file) in _complaint(RouterSettings, file)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    complaint = _complaint(RouterSettings, tmp_path / "nowhere.yaml")
    assert "nowhere.yaml: No such file or directory" in complaint
    assert str(tmp_path) in _complaint(RouterSettings, tmp_path)


def test_empty_file_sets_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMSHARD_ROUTER_CATALOG_DSN", _DSN)
    assert load(RouterSettings, _written(tmp_path, "# nothing\n")).model_dump() == load(RouterSettings).model_dump()


@pytest.mark.parametrize("service", list(config.SETTINGS.values()))
def test_generated_file_is_valid_once_the_required_settings_are_filled_in(
    tmp_path: Path, service: type[ProcessSettings]
) -> None:
    required = _REQUIRED[service]
    lines = []
    for line in generate(service).splitlines():
        name = line.removesuffix(":  # required")
        if name != line:
            line = f"{name}: {required[name]}"  # noqa: PLW2901  # The line as somebody edits it.
        lines.append(line)
    by_hand = load(service, _written(tmp_path, "\n".join(lines)))
    assert by_hand.model_dump() == load(service, _written(tmp_path, required)).model_dump()


@pytest.mark.parametrize("service", list(config.SETTINGS.values()))
def test_defaults_in_the_generated_file_are_the_defaults(tmp_path: Path, service: type[ProcessSettings]) -> None:
    offered: dict[str, Any] = {}
    for line in generate(service).splitlines():
        name, _, value = line.removeprefix("# ").partition(": ")
        if line.startswith("# ") and name in service.model_fields and name not in offered:
            offered[name] = yaml.safe_load(value)
    required = _REQUIRED[service]
    assert offered.keys() == service.model_fields.keys() - required.keys()
    loaded = load(service, _written(tmp_path, {**required, **offered}))
    assert loaded.model_dump() == load(service, _written(tmp_path, required)).model_dump()


@pytest.mark.parametrize("service", list(config.SETTINGS.values()))
def test_every_setting_says_what_it_is(service: type[ProcessSettings]) -> None:
    assert [name for name, field in service.model_fields.items() if not field.description] == []


def test_settings_show_no_secret_and_do_not_change(tmp_path: Path) -> None:
    redis = f"redis://:{_SECRET}@cache:6379/0"
    file = _written(tmp_path, {"catalog_dsn": _DSN, "redis_url": redis, "embedder_api_key": _SECRET})
    settings = load(RouterSettings, file)
    assert _SECRET not in repr(settings)
    assert _SECRET not in str(settings)
    with pytest.raises(ValueError, match="frozen"):
        settings.port = 1


def test_a_shards_database_is_found_by_name_or_by_template(tmp_path: Path) -> None:
    template = "postgresql://mover:secret@{shard_id}-rw:5432/memshard"
    given = {"catalog_dsn": _DSN, "shard_dsns": {"shard-0": _DSN}, "shard_dsn_template": template}
    settings = load(MoverSettings, _written(tmp_path, given))
    assert settings.shard_dsn("shard-0") == _DSN
    assert settings.shard_dsn("shard-7") == "postgresql://mover:secret@shard-7-rw:5432/memshard"
    with pytest.raises(ConfigError, match="shard-7"):
        load(MoverSettings, _written(tmp_path, {"catalog_dsn": _DSN})).shard_dsn("shard-7")
    assert "shard_id" in _complaint(
        MoverSettings, _written(tmp_path, {"catalog_dsn": _DSN, "shard_dsn_template": _DSN})
    )


def test_opentelemetrys_own_variables_are_heard_before_the_file_and_after_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "router.yaml"
    file.write_text("catalog_dsn: postgresql://u@h/d\ntraces_exporter: console\ntraces_sample_ratio: 0.5\n")
    assert config.load(RouterSettings, file).traces_exporter == "console"
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "otlp")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0.25")
    heard = config.load(RouterSettings, file)
    assert (heard.traces_exporter, heard.traces_sample_ratio) == ("otlp", 0.25)
    monkeypatch.setenv("MEMSHARD_ROUTER_TRACES_EXPORTER", "none")
    assert config.load(RouterSettings, file).traces_exporter == "none"
    monkeypatch.setenv("MEMSHARD_ROUTER_TRACES_EXPORTER", "zipkin")
    with pytest.raises(ConfigError, match="traces_exporter"):
        config.load(RouterSettings, file)
