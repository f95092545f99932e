"""The compose files: compose takes them, and they say what the services understand."""

import re
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from common import dsn, provision
from common.config import ReplicaSettings, RouterSettings, ServiceSettings, ShardSettings
from tests.deploy import compose
from tests.deploy.compose import DIRECTORY, FILE, LOCAL, Document
from tests.deploy.settings import service_of, settings_of


def services() -> dict[str, Document]:
    found: dict[str, Document] = compose.load(FILE)["services"]
    return found


def settings() -> dict[str, ServiceSettings]:
    """The settings of every container that runs a service."""
    return {
        name: settings_of(service, document["environment"])
        for name, document in services().items()
        if (service := service_of(document.get("command", [])))
    }


def test_it_is_what_was_asked_for() -> None:
    found = settings().values()
    kinds = (RouterSettings, ShardSettings, ReplicaSettings)
    assert [sum(isinstance(each, kind) for each in found) for kind in kinds] == [2, 2, 2]
    assert {"redis", "jaeger", "prometheus", "alertmanager", "grafana"} <= services().keys()
    assert services()["postgres-shard-0"]["image"].startswith("pgvector/pgvector:")


def test_each_environment_is_what_its_service_reads_and_names_hosts_that_are_there() -> None:
    for name, each in settings().items():
        assert each.host == "0.0.0.0", name
        for field in type(each).model_fields:
            value = getattr(each, field)
            url = value.get_secret_value() if hasattr(value, "get_secret_value") else ""
            hosts = dsn.hosts(url) if url.startswith("postgresql:") else []
            hosts += [(urlsplit(url).hostname or "", 6379)] if url.startswith("redis:") else []
            for host, port in hosts:
                assert host in services(), f"{name}: {field}"
                assert port == (6379 if host == "redis" else 5432)
        assert services()[name]["environment"]["MEMSHARD_HEALTH_ADDRESS"] == f"127.0.0.1:{each.port}"


def test_the_mover_reaches_the_servers_of_every_shard() -> None:
    pytest.importorskip("shard.mover", reason="there is no mover in this version")
    document = services()["mover"]
    assert document["entrypoint"][-3:] == ["python", "-m", "shard.mover"]
    mover: Any = settings_of("mover", document["environment"])
    for shard in (each for each in settings().values() if isinstance(each, ShardSettings)):
        theirs, its = shard.database_dsn.get_secret_value(), mover.shard_dsn(shard.shard_id)
        assert dsn.hosts(its) == dsn.hosts(theirs)


def test_the_description_names_the_services_by_their_addresses_and_the_servers_by_theirs() -> None:
    described = provision.read_description(DIRECTORY / "cluster.yaml")
    listening = settings()
    for shard_id, shard in described.shards.items():
        host, _, port = shard.address.partition(":")
        own = listening[host]
        assert isinstance(own, ShardSettings)
        assert (own.shard_id, own.port) == (shard_id, int(port))
        assert shard.primary_server == dsn.hosts(own.database_dsn.get_secret_value())[0][0]
        assert services()[shard.primary_server]["environment"]["NAME"] == shard.primary_server
        for address in shard.replicas.values():
            host, _, port = address.partition(":")
            replica = listening[host]
            assert isinstance(replica, ReplicaSettings)
            assert (replica.shard_id, replica.port) == (shard_id, int(port))
            ((standby, _),) = dsn.hosts(replica.database_dsn.get_secret_value())
            primary = services()[standby]["environment"]["PRIMARY"]
            assert primary == f"{shard.primary_server}:5432"


def test_the_routers_token_is_where_init_puts_it() -> None:
    script = (DIRECTORY / "init.sh").read_text()
    for name, each in settings().items():
        if isinstance(each, RouterSettings):
            assert f"token={each.admin_token_file}\n" in script
            assert f"admin:{Path(str(each.admin_token_file)).parent}:ro" in services()[name]["volumes"]


def test_containers_have_no_more_rights_than_they_need() -> None:
    for name in settings():
        document = services()[name]
        assert document["read_only"] is True
        assert document["cap_drop"] == ["ALL"]
        assert document["security_opt"] == ["no-new-privileges:true"]
        assert "user" not in document


def test_nothing_holds_a_secret_and_the_example_has_none() -> None:
    secret = {name for name in compose.example_environment() if name.endswith("PASSWORD")}
    assert {compose.example_environment()[name] for name in secret} == {"change-me"}
    for file in (FILE, LOCAL):
        for password in re.findall(r"://[^:/@\s]*:([^@\s]+)@", file.read_text()):
            assert re.fullmatch(r"\$\{[A-Z_]+:\?\}", password), password


def test_the_override_changes_only_what_is_there() -> None:
    local = compose.load(LOCAL)["services"]
    assert local.keys() <= services().keys()
    theirs = {name for name, each in services().items() if "MEMSHARD_IMAGE" not in str(each) and "image" in each}
    pulled = {name for name in theirs if services()[name]["image"] != compose.example_environment()["MEMSHARD_IMAGE"]}
    # What is not made from the one image starts only when it is asked for.
    assert {n for n in pulled if "image" not in local.get(n, {}) and "profiles" not in local.get(n, {})} == set()


@pytest.mark.parametrize("script", ["init.sh", "postgres.sh", "redis.sh"])
def test_the_scripts_are_shell(script: str) -> None:
    subprocess.run(["sh", "-n", str(DIRECTORY / script)], check=True, timeout=10)


@pytest.mark.parametrize("files", [(FILE,), (FILE, LOCAL)])
def test_compose_takes_the_files(files: tuple[Path, ...]) -> None:
    if compose.command() is None:
        pytest.skip("there is neither `docker compose` nor docker-compose here")
    done = compose.run("config", files=files, variables=compose.example_environment())
    # Those that start only when asked for, old ones print as well.
    optional = {"mover", *({"jaeger", "prometheus", "alertmanager", "grafana"} if files[-1] is LOCAL else ())}
    assert services().keys() - optional <= yaml.safe_load(done.stdout)["services"].keys() <= services().keys()
