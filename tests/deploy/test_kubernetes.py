"""The Kubernetes manifests: they render, are valid, fit together, and say what the services understand."""

import os
import re
from itertools import chain
from pathlib import Path
from typing import Any
from unittest.mock import patch
from urllib.parse import urlsplit

import jsonschema
import kubernetes_validate
import pytest
import typer.main
import yaml

from cli.main import app
from common import health, provision
from common.config import ReplicaSettings, RouterSettings, ServiceSettings, ShardSettings
from memshard.internal.v1 import shard_pb2
from memshard.v1 import memory_pb2
from tests.deploy.kubernetes import (
    JOBS,
    OVERLAYS,
    Manifest,
    Workload,
    named,
    of_kind,
    render,
    selects,
    strings,
    workloads,
)
from tests.deploy.settings import service_of, settings_of

# The oldest release with a pause before the end that needs no shell in the image (preStop.sleep), and the newest known.
VERSIONS = ("1.32", kubernetes_validate.latest_version())
# Whose kinds Kubernetes does not know.
OPERATORS = ("postgresql.cnpg.io/", "monitoring.coreos.com/")
HEALTH_NAMES = {
    "router": {memory_pb2.DESCRIPTOR.services_by_name["MemoryService"].full_name},
    "shard": {shard_pb2.DESCRIPTOR.services_by_name["ShardService"].full_name},
    "replica": {shard_pb2.DESCRIPTOR.services_by_name["ShardService"].full_name},
}
# What README.md has operators make.
SECRETS = {
    "memshard-database-owner": {"username", "password"},
    "memshard-database-app": {"username", "password"},
    "memshard-database-mover": {"username", "password"},
    "memshard-redis": {"url", "password"},
    "memshard-admin": {"token"},
}


def _cluster_schemas() -> list[Manifest]:
    """Ours, and the operator's own where somebody has it."""
    schemas = [yaml.safe_load(Path(__file__).with_name("cnpg_cluster_schema.yaml").read_text())]
    if file := os.environ.get("MEMSHARD_CNPG_CRD"):
        definition = yaml.safe_load(Path(file).read_text())
        schemas += [_closed(v["schema"]["openAPIV3Schema"]) for v in definition["spec"]["versions"] if v["served"]]
    return schemas


def _closed(schema: Manifest) -> Manifest:
    """The same, with no field allowed that it does not name: Kubernetes drops those in silence."""
    closed = {key: _closed(value) if isinstance(value, dict) else value for key, value in schema.items()}
    if schema.get("type") == "object" and "properties" in schema:
        closed.setdefault("additionalProperties", False)
    return closed


CLUSTER_SCHEMAS = _cluster_schemas()

everything = pytest.mark.parametrize("directory", [*OVERLAYS, *JOBS])
overlays = pytest.mark.parametrize("directory", OVERLAYS)


def services(directory: str) -> list[tuple[Workload, Manifest, str]]:
    """The containers that run a service, with the service's name."""
    found = [
        (workload, container, service)
        for workload in workloads(render(directory))
        for container in workload.containers
        if (service := service_of(workload.command(container)))
    ]
    assert found or directory in JOBS
    return found


@everything
@pytest.mark.parametrize("version", VERSIONS)
def test_built_in_kinds_are_valid_to_the_letter(directory: str, version: str) -> None:
    for manifest in render(directory):
        if not manifest["apiVersion"].startswith(OPERATORS):
            kubernetes_validate.validate(manifest, version, strict=True)


def test_a_slip_in_a_manifest_is_seen() -> None:
    (job,) = of_kind(render("jobs/add-shard"), "Job")
    slipped = {**job, "spec": {**job["spec"], "backOffLimit": 3}}
    with pytest.raises(kubernetes_validate.ValidationError, match="backOffLimit"):
        kubernetes_validate.validate(slipped, VERSIONS[0], strict=True)


@overlays
def test_postgres_clusters_are_what_cloudnative_pg_takes(directory: str) -> None:
    clusters = of_kind(render(directory), "Cluster")
    assert {m["metadata"]["name"] for m in clusters} == {"memshard-catalog", "shard-0-postgres", "shard-1-postgres"}
    for cluster in clusters:
        for schema in CLUSTER_SCHEMAS:
            jsonschema.validate(cluster, schema)
        # Parameters are text for PostgreSQL: YAML's `off` would be a boolean.
        assert all(isinstance(value, str) for value in cluster["spec"]["postgresql"]["parameters"].values())


def test_commits_are_on_a_quorum_and_survive_a_failover_in_production() -> None:
    for cluster in of_kind(render("overlays/production"), "Cluster"):
        spec = cluster["spec"]
        assert spec["instances"] >= 3
        assert spec["postgresql"]["synchronous"] == {
            "method": "any",
            "number": 1,
            "dataDurability": "required",
            "failoverQuorum": True,
        }
        version = re.search(r"postgresql:(\d+)\.(\d+)-standard-", spec["imageName"])
        assert version, "only the standard images have pgvector"
        assert int(version[1]) >= 17
        if cluster["metadata"]["name"] != "memshard-catalog":
            assert spec["replicationSlots"]["highAvailability"]["synchronizeLogicalDecoding"]
            assert spec["postgresql"]["parameters"]["wal_level"] == "logical"
            assert "CREATE EXTENSION vector" in spec["bootstrap"]["initdb"]["postInitApplicationSQL"]


@overlays
def test_the_environment_of_each_container_is_what_its_service_reads(directory: str) -> None:
    seen: set[str] = set()
    for workload, container, service in services(directory):
        settings = settings_of(service, workload.environment(container))
        seen.add(service)
        assert settings.host == "0.0.0.0"
        assert settings.port == workload.ports()["grpc"]
        assert _hosts(settings) <= _reachable(directory), named(workload.manifest)
        if isinstance(settings, ShardSettings | ReplicaSettings):
            assert workload.manifest["metadata"]["name"].startswith(f"{settings.shard_id}-")
        if isinstance(settings, ShardSettings):
            assert settings.sync_set == "external", "CloudNativePG lets nobody else set synchronous_standby_names"
        if isinstance(settings, RouterSettings):
            assert settings.admin_port == workload.ports()["grpc-admin"]
            assert settings.admin_token_file is not None
            mounts = {m["mountPath"]: m["name"] for m in container["volumeMounts"]}
            volume = mounts[str(settings.admin_token_file.parent)]
            secret = next(v["secret"] for v in workload.template["spec"]["volumes"] if v["name"] == volume)
            assert settings.admin_token_file.name in {item["path"] for item in secret["items"]}
    assert seen == {"router", "shard", "replica"}


def _hosts(settings: ServiceSettings) -> set[str]:
    """The hosts of every URL among the settings."""
    values = (getattr(settings, name) for name in type(settings).model_fields)
    urls = (v.get_secret_value() for v in values if hasattr(v, "get_secret_value"))
    return {urlsplit(url).hostname or "" for url in urls}


def _reachable(directory: str) -> set[str]:
    """Names of the Services: those in the manifests, and those that CloudNativePG makes for each of its clusters."""
    manifests = render(directory)
    made = (f"{m['metadata']['name']}-{suffix}" for m in of_kind(manifests, "Cluster") for suffix in ("rw", "ro", "r"))
    return {*(m["metadata"]["name"] for m in of_kind(manifests, "Service")), *made}


@overlays
def test_the_description_names_what_there_is(directory: str) -> None:
    manifests = render(directory)
    data = next(m["data"] for m in of_kind(manifests, "ConfigMap") if m["metadata"]["name"] == "memshard-cluster")
    described = provision.ClusterDescription.model_validate(yaml.safe_load(data["cluster.yaml"]))
    ports = {
        f"{m['metadata']['name']}:{port['port']}" for m in of_kind(manifests, "Service") for port in m["spec"]["ports"]
    }
    settings = [settings_of(service, w.environment(c)) for w, c, service in services(directory)]
    assert set(described.shards) == {s.shard_id for s in settings if isinstance(s, ShardSettings)}
    for shard in described.shards.values():
        assert {shard.address, *shard.replicas.values()} <= ports
    embedders = {s.embedder for s in settings if isinstance(s, RouterSettings | ShardSettings)}
    assert embedders == {described.embedder}


@overlays
def test_probes_ask_the_ports_and_names_that_the_services_answer_for(directory: str) -> None:
    for workload, container, service in services(directory):
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            asked = container[probe]["grpc"]
            assert asked["port"] == workload.ports()["grpc"], named(workload.manifest)
            names = HEALTH_NAMES[service] if probe == "readinessProbe" else {health.LIVENESS}
            assert asked["service"] in names, named(workload.manifest)


@overlays
def test_a_service_drains_before_it_is_killed(directory: str) -> None:
    for workload, container, service in services(directory):
        pause_s = container["lifecycle"]["preStop"]["sleep"]["seconds"]
        drain_s = settings_of(service, workload.environment(container)).drain_timeout_s
        assert pause_s + drain_s < workload.template["spec"]["terminationGracePeriodSeconds"]


@overlays
def test_selectors_find_exactly_their_own_pods(directory: str) -> None:
    manifests = render(directory)
    pods = workloads(manifests)
    for workload in pods:
        if "selector" in workload.manifest["spec"]:
            found = [named(w.manifest) for w in pods if selects(workload.manifest["spec"]["selector"], w.labels)]
            assert found == [named(workload.manifest)]
    for service in of_kind(manifests, "Service"):
        behind = [w for w in pods if selects({"matchLabels": service["spec"]["selector"]}, w.labels)]
        assert len(behind) == 1, named(service)
        for port in service["spec"]["ports"]:
            assert behind[0].ports()[port["targetPort"]] == port["port"], named(service)
    for budget in of_kind(manifests, "PodDisruptionBudget"):
        assert [w for w in pods if selects(budget["spec"]["selector"], w.labels)], named(budget)
    for scaler in of_kind(manifests, "HorizontalPodAutoscaler"):
        target = scaler["spec"]["scaleTargetRef"]
        scaled = next(m for m in of_kind(manifests, target["kind"]) if m["metadata"]["name"] == target["name"])
        # Else each `kubectl apply` would undo what it has decided.
        assert "replicas" not in scaled["spec"]


@everything
def test_what_a_pod_names_is_there(directory: str) -> None:
    base = render(OVERLAYS[0])
    manifests = render(directory)
    there = {named(manifest) for manifest in chain(manifests, base if directory in JOBS else ())}
    for workload in workloads(manifests):
        spec = workload.template["spec"]
        assert f"ServiceAccount/{spec['serviceAccountName']}" in there
        references = [r for c in workload.containers for r in [*c.get("env", ()), *c.get("envFrom", ())]]
        for reference in references:
            if secret := reference.get("valueFrom", {}).get("secretKeyRef"):
                assert secret["key"] in SECRETS[secret["name"]]
            if map_ := reference.get("configMapRef"):
                assert f"ConfigMap/{map_['name']}" in there
        for volume in spec.get("volumes", ()):
            if "configMap" in volume:
                assert f"ConfigMap/{volume['configMap']['name']}" in there
            if "secret" in volume:
                assert {i["key"] for i in volume["secret"]["items"]} <= SECRETS[volume["secret"]["secretName"]]
    for cluster in of_kind(manifests, "Cluster"):
        spec = cluster["spec"]
        names = [spec["bootstrap"]["initdb"]["secret"]["name"], *(r["passwordSecret"]["name"] for r in _roles(spec))]
        assert set(names) <= set(SECRETS)


def _roles(spec: Manifest) -> list[Manifest]:
    roles: list[Manifest] = spec["managed"]["roles"]
    return roles


@everything
def test_pods_have_no_more_rights_than_they_need(directory: str) -> None:
    for workload in workloads(render(directory)):
        spec = workload.template["spec"]
        assert spec["automountServiceAccountToken"] is False
        # A Service called memshard-router-admin would become MEMSHARD_ROUTER_ADMIN_PORT=tcp://…, which is a setting.
        assert spec["enableServiceLinks"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in workload.containers:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["limits"]["memory"]


@everything
def test_no_manifest_holds_a_secret(directory: str) -> None:
    manifests = render(directory)
    assert not of_kind(manifests, "Secret")
    for text in chain.from_iterable(strings(manifest) for manifest in manifests):
        for password in re.findall(r"://[^:/@]*:([^@]+)@", text):
            assert re.fullmatch(r"\$\([A-Z_]+\)", password), text


@overlays
def test_policies_let_through_what_the_services_need_and_nothing_by_default(directory: str) -> None:
    manifests = render(directory)
    policies = of_kind(manifests, "NetworkPolicy")
    denied = [p for p in policies if p["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}]
    assert len(denied) == 1
    databases = [{"memshard.io/database": kind} for kind in ("catalog", "shard")]
    by_name = {w.labels["app.kubernetes.io/name"]: w.labels for w in workloads(manifests)}
    router, shard = by_name["memshard-router"], by_name["memshard-shard"]
    replica, job = by_name["memshard-replica"], by_name["memshard-catalog-create"]
    mover = workloads(render("jobs/rebalance"))[0].labels
    client = {"memshard.io/client": "true"}
    prometheus = {"app.kubernetes.io/name": "prometheus"}
    redis, proxy = by_name["memshard-redis"], by_name["memshard-redis-proxy"]
    wanted = [
        (client, router, 50051),
        (job, router, 50052),
        (mover, databases[0], 5432),
        (mover, databases[1], 5432),
        (router, shard, 50061),
        (router, replica, 50071),
        (router, databases[0], 5432),
        (router, proxy, 6379),
        (proxy, redis, 6379),
        (redis, redis, 26379),
        *((prometheus, service, 9464) for service in (router, shard, replica) if directory == "overlays/production"),
        *((service, database, 5432) for service in (shard, replica, job) for database in databases),
        (databases[1], databases[1], 5432),
    ]
    for source, target, port in wanted:
        assert _passes(policies, source, target, port), (source, target, port)
    for source, target, port in [
        (client, router, 50052),
        (client, shard, 50061),
        (client, databases[1], 5432),
        (client, redis, 6379),
        (router, databases[1], 5433),
        (shard, router, 50051),
        (client, router, 9464),
        (prometheus, router, 50052),
        (prometheus, databases[1], 5432),
    ]:
        assert not _passes(policies, source, target, port), (source, target, port)


def _passes(policies: list[Manifest], source: dict[str, str], target: dict[str, str], port: int) -> bool:
    """Whether some policy of the source lets it out to the target, and some policy of the target lets it in."""
    # Clients and Prometheus are in namespaces of their own, where no policy of ours holds.
    elsewhere = "memshard.io/client" in source or source.get("app.kubernetes.io/name") == "prometheus"
    out = elsewhere or _allowed(policies, "egress", "to", source, target, port)
    return out and _allowed(policies, "ingress", "from", target, source, port)


def _allowed(
    policies: list[Manifest], direction: str, peers: str, whose: dict[str, str], peer: dict[str, str], port: int
) -> bool:
    return any(
        port in {p["port"] for p in rule.get("ports", ())}
        and any(selects(each.get("podSelector", {}), peer) for each in rule.get(peers, ()))
        for policy in policies
        if selects(policy["spec"]["podSelector"], whose)
        for rule in policy["spec"].get(direction, ())
    )


def test_the_job_of_the_catalog_is_a_command_of_memshards() -> None:
    (job,) = [w for w in workloads(render(OVERLAYS[0])) if w.manifest["kind"] == "Job"]
    (container,) = job.containers
    program, *words = job.command(container)
    assert program == "memshard"
    command: Any = typer.main.get_command(app)
    with patch.dict(os.environ, job.environment(container), clear=True):
        context = None
        while hasattr(command, "commands"):
            context = command.make_context(command.name or "", [words[0]], parent=context)
            command = command.commands[words.pop(0)]
        # Raises for whatever the command does not understand.
        command.make_context(command.name, words, parent=context)


@pytest.mark.parametrize("directory", JOBS)
def test_the_jobs_that_move_slots_are_what_the_mover_reads(directory: str) -> None:
    mover = pytest.importorskip("shard.mover", reason="there is no mover in this version")
    (job,) = workloads(render(directory))
    (container,) = job.containers
    command = job.command(container)
    assert command[:3] == ["python", "-m", "shard.mover"]
    assert not any("$(" in word for word in command)
    given = mover.arguments_of(command[3:])
    assert given.command == directory.removeprefix("jobs/").removesuffix("-shard")
    settings: Any = settings_of("mover", job.environment(container))
    hosts = {urlsplit(settings.catalog_dsn.get_secret_value()).hostname}
    if hasattr(given, "shard"):
        assert given.shard == job.environment(container)["SHARD"]
    # Of the shards that there are: the new one's follows from its name in the same way.
    hosts |= {urlsplit(settings.shard_dsn(shard_id)).hostname for shard_id in ("shard-0", "shard-1")}
    assert hosts <= _reachable(OVERLAYS[0])
    if given.command == "add":
        suffixes = {name.removeprefix("shard-0") for name in _reachable(OVERLAYS[0])}
        addresses = [given.address, *(address for _, address in given.replica)]
        assert addresses == ["shard-2-server:50061", "shard-2-replica:50071"]
        assert {address.partition(":")[0].removeprefix("shard-2") for address in addresses} <= suffixes
