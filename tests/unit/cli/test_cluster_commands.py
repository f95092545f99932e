from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from cli.cluster_view import first_commands
from cli.main import app
from local.up import Ready

RUNNER = CliRunner()


def _ready(address: str, embedder: str = "local") -> Ready:
    return Ready((address,), "/d", "/d/logs", embedder, 4, 1.0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--routers", "0"], "--routers"),
        (["--replicas", "9"], "--replicas"),
        (["--replicas", "-1"], "--replicas"),
        (["--port", "70000"], "--port"),
        (["--port", "65535", "--routers", "2"], "--port"),
    ],
)
def test_impossible_options_touch_nothing(tmp_path: Path, arguments: list[str], named: str) -> None:
    result = RUNNER.invoke(app, ["up", *arguments, "--data-dir", str(tmp_path / "d")])
    assert result.exit_code == 2
    assert named in result.output
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["shards", "drain", "shard-1", "--max-rate", "-5"], "--max-rate"),
        (["shards", "set", "shard-1"], "say --status or --weight"),
        (["shards", "set", "shard-1", "--status", "asleep"], "maintenance"),
        (["shards", "set", "shard-1", "--weight", "0"], "--weight"),
        (["shards", "set", "shard-1", "--weight", "10001"], "--weight"),
        (["shards", "add", "--weight", "99999999999"], "--weight"),
        (["shards", "pin", "--user", "", "--shard", "shard-0"], "--user"),
        (["moves", "rollback", "0"], "MOVE"),
        (["moves", "rollback", "99999999999999999999"], "MOVE"),
        (["rebalance", "--max-rate", "-1"], "--max-rate"),
        (["rebalance", "--max-rate", "fast"], "--max-rate"),
        (["rebalance", "--max-rate", "99999999999999999999"], "--max-rate"),
        (["rebalance", "--rollback-window", "-1"], "--rollback-window"),
        (["rebalance", "--rollback-window", "nan"], "--rollback-window"),
        (["rebalance", "--rollback-window", "604801"], "--rollback-window"),
    ],
)
def test_what_no_shard_or_move_can_be_is_refused_before_anybody_is_asked(
    tmp_path: Path, arguments: list[str], named: str
) -> None:
    result = RUNNER.invoke(app, [*arguments, "--data-dir", str(tmp_path / "none")])
    assert result.exit_code == 2
    assert named in result.output


def test_a_failover_where_nothing_is_says_so(tmp_path: Path) -> None:
    result = RUNNER.invoke(app, ["failover", "shard-0", "--data-dir", str(tmp_path / "none")])
    assert result.exit_code == 1
    assert "there is no cluster" in result.output


def test_commands_to_paste_name_the_address_only_when_it_is_not_the_default() -> None:
    assert all("--address" not in line for line in first_commands(_ready("127.0.0.1:50051")))
    assert all("--address 127.0.0.1:7" in line for line in first_commands(_ready("127.0.0.1:7")))
    add, _ = first_commands(_ready("127.0.0.1:50051", "none"))
    assert "[0.1] * 4" in add


def test_status_and_down_where_nothing_is(tmp_path: Path) -> None:
    status = RUNNER.invoke(app, ["status", "--json", "--data-dir", str(tmp_path / "none")])
    assert status.exit_code == 1
    assert yaml.safe_load(status.stdout)["processes"] == []
    down = RUNNER.invoke(app, ["down", "--data-dir", str(tmp_path / "none")])
    assert down.exit_code == 0
    assert "Nothing runs" in down.output


@pytest.mark.parametrize("service", ["router", "shard", "replica"])
def test_a_generated_file_is_yaml_and_names_what_is_required(service: str) -> None:
    result = RUNNER.invoke(app, ["config", "generate", service])
    assert result.exit_code == 0
    assert "catalog_dsn" in yaml.safe_load(result.stdout)


def test_validation_names_every_field_at_fault(tmp_path: Path) -> None:
    file = tmp_path / "router.yaml"
    file.write_text("port: 99999\nfanout_concurrency: none\nshard_count: 2\n")
    result = RUNNER.invoke(app, ["config", "validate", "router", str(file)])
    assert result.exit_code == 1
    for name in ("port", "fanout_concurrency", "shard_count", "catalog_dsn"):
        assert name in result.stderr
    assert result.stdout == ""


def test_a_good_file_is_valid(tmp_path: Path) -> None:
    file = tmp_path / "router.yaml"
    file.write_text("catalog_dsn: postgresql://a@b/c\n")
    result = RUNNER.invoke(app, ["config", "validate", "router", str(file)])
    assert result.exit_code == 0
    assert "valid" in result.stdout
    missing = RUNNER.invoke(app, ["config", "validate", "router", str(tmp_path / "none.yaml")])
    assert missing.exit_code == 1
