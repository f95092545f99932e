"""One set of rules and dashboards, wherever the cluster runs; and Prometheus finds every service there."""

import json
import re
import runpy
from collections import Counter
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.deploy import compose, monitoring
from tests.deploy.compose import FILE
from tests.deploy.kubernetes import OVERLAYS, Workload, named, of_kind, render, workloads
from tests.deploy.monitoring import DIRECTORY, JOBS, scrape_config, scraped_by_monitor, scraped_by_pod
from tests.deploy.settings import service_of, settings_of

PRODUCTION = OVERLAYS[0]
SCHEMA = yaml.safe_load(Path(__file__).with_name("prometheus_operator_schema.yaml").read_text())
RULES = sorted((DIRECTORY / "prometheus").glob("rules-*.yml"))


def exposed() -> set[int]:
    """The ports that the image is documented to have."""
    (line,) = re.findall(r"^EXPOSE (.+)$", (DIRECTORY.parent / "Dockerfile").read_text(), re.MULTILINE)
    return {int(port) for port in line.split()}


def pods(directory: str) -> list[tuple[Workload, str, Any]]:
    """What runs a service, with the service's name and its settings."""
    return [
        (workload, service, settings_of(service, workload.environment(container)))
        for workload in workloads(render(directory))
        for container in workload.containers
        if (service := service_of(workload.command(container)))
    ]


# Compose.


def test_compose_has_prometheus_ask_every_service_where_it_has_its_metrics() -> None:
    asked = {
        target["targets"][0]: target["labels"]
        for target in json.loads((compose.DIRECTORY / "targets.json").read_text())
        if len(target["targets"]) == 1
    }
    services: dict[str, Any] = compose.load(FILE)["services"]
    wanted = {}
    for name, document in services.items():
        if service := service_of(document.get("command", [])):
            settings = settings_of(service, document["environment"])
            assert settings.metrics_host == "0.0.0.0", name
            assert settings.metrics_port in exposed(), name
            wanted[f"{name}:{settings.metrics_port}"] = {"job": JOBS[service], "service": name}
    assert asked == wanted
    assert len(asked) == 6


def test_compose_mounts_the_one_set_to_where_it_is_looked_for() -> None:
    services: dict[str, Any] = compose.load(FILE)["services"]
    mounts: dict[str, dict[str, Path]] = {}
    for name in ("prometheus", "alertmanager", "grafana"):
        of_files = [volume.split(":") for volume in services[name]["volumes"] if volume.startswith(".")]
        assert all(options == ["ro"] for _, _, *options in of_files)
        mounts[name] = {target: (compose.DIRECTORY / source).resolve() for source, target, _ in of_files}
    assert all(source.exists() for each in mounts.values() for source in each.values())

    file = "/etc/prometheus/prometheus.yml"
    assert f"--config.file={file}" in services["prometheus"]["command"]
    config = yaml.safe_load(mounts["prometheus"][file].read_text())
    assert mounts["prometheus"][file].is_relative_to(DIRECTORY)
    assert {mounts["prometheus"][f"/etc/prometheus/{rules}"] for rules in config["rule_files"]} == set(RULES)
    (pattern,) = config["scrape_configs"][0]["file_sd_configs"][0]["files"]
    found = [path for path in mounts["prometheus"] if Path(path).match(f"/etc/prometheus/{pattern}")]
    assert [mounts["prometheus"][path].name for path in found] == ["targets.json"]
    (alertmanager,) = config["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"]
    assert alertmanager.partition(":")[0] in services

    provisioning = mounts["grafana"]["/etc/grafana/provisioning"]
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "memshard.yml").read_text())["providers"]
    assert list(mounts["grafana"][provider["options"]["path"]].glob("*.json"))
    sources = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"]
    hosts = {re.sub(r"https?://([^:/]+).*", r"\1", source["url"]) for source in sources}
    assert hosts == {"prometheus", "jaeger"} <= services.keys()


def test_compose_has_traces_go_to_jaeger_and_the_image_can_send_them() -> None:
    services: dict[str, Any] = compose.load(FILE)["services"]
    for name, document in services.items():
        if service := service_of(document.get("command", [])):
            assert settings_of(service, document["environment"]).traces_exporter == "otlp", name
            assert document["environment"]["OTEL_EXPORTER_OTLP_ENDPOINT"] == "http://jaeger:4317"
    assert re.search(r"^ARG EXTRAS=.*\botlp\b", (DIRECTORY.parent / "Dockerfile").read_text(), re.MULTILINE)


# Kubernetes.


@pytest.mark.parametrize("directory", OVERLAYS)
def test_every_service_has_its_metrics_on_the_port_that_says_so(directory: str) -> None:
    found = pods(directory)
    assert {service for _, service, _ in found} == JOBS.keys()
    for workload, _, settings in found:
        assert settings.metrics_host == "0.0.0.0", named(workload.manifest)
        assert settings.metrics_port == workload.ports()["metrics"], named(workload.manifest)
        assert settings.metrics_port in exposed(), named(workload.manifest)


def test_the_service_monitor_finds_each_service_once_and_calls_its_job_by_its_name() -> None:
    manifests = render(PRODUCTION)
    (monitor,) = of_kind(manifests, "ServiceMonitor")
    found = scraped_by_monitor(monitor, manifests)
    behind: Counter[str] = Counter()
    for service, port, job in found:
        (workload, kind, settings), *others = [
            each for each in pods(PRODUCTION) if service["spec"]["selector"].items() <= each[0].labels.items()
        ]
        assert not others
        assert job == JOBS[kind]
        (target,) = [each["targetPort"] for each in service["spec"]["ports"] if each["name"] == port]
        assert workload.ports()[target] == settings.metrics_port
        behind[named(workload.manifest)] += 1
    assert behind == {named(workload.manifest): 1 for workload, _, _ in pods(PRODUCTION)}
    # A port that nothing has is scraped by nobody, and says nothing of it.
    assert {endpoint["port"] for endpoint in monitor["spec"]["endpoints"]} == {port for _, port, _ in found}


@pytest.mark.parametrize("directory", OVERLAYS)
def test_a_prometheus_without_its_operator_finds_the_same(directory: str) -> None:
    config = scrape_config("prometheus-kubernetes.yml")
    known = {named(workload.manifest): JOBS[service] for workload, service, _ in pods(directory)}
    for workload in workloads(render(directory)):
        job = known.get(named(workload.manifest))
        assert scraped_by_pod(workload, config) == ({"metrics": job} if job else {})


def test_what_the_operator_and_grafana_get_is_what_the_others_get() -> None:
    manifests = render(PRODUCTION)
    (dashboards,) = [m for m in of_kind(manifests, "ConfigMap") if "grafana_dashboard" in m["metadata"]["labels"]]
    files = {file.name: file.read_text() for file in (DIRECTORY / "grafana" / "dashboards").glob("*.json")}
    assert dashboards["data"] == files
    groups = [group for manifest in of_kind(manifests, "PrometheusRule") for group in manifest["spec"]["groups"]]
    assert groups == [group for file in RULES for group in yaml.safe_load(file.read_text())["groups"]]
    for manifest in of_kind(manifests, "ServiceMonitor", "PrometheusRule"):
        jsonschema.validate(manifest, SCHEMA)


def test_a_slip_in_a_manifest_of_the_operators_is_seen() -> None:
    (monitor,) = of_kind(render(PRODUCTION), "ServiceMonitor")
    slipped = {**monitor, "spec": {**monitor["spec"], "joblabel": "x"}}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(slipped, SCHEMA)


def test_the_operators_rules_are_up_to_date() -> None:
    made: dict[str, str] = runpy.run_path(str(DIRECTORY / "generate_kubernetes.py"))["manifests"]()
    there = {file.name: file.read_text() for file in (DIRECTORY / "kubernetes").iterdir()}
    assert made == there, "run `make docs`"


def test_without_the_component_there_is_nothing_of_the_operators() -> None:
    groups = {manifest["apiVersion"] for manifest in render("overlays/small")}
    assert not any("monitoring" in group for group in groups)


def test_relabelling_is_as_in_prometheus() -> None:
    configs = [
        {"source_labels": ["a", "b"], "regex": "(x);(y)", "target_label": "c", "replacement": "$2-$1"},
        {"source_labels": ["c"], "regex": "y", "action": "keep"},
    ]
    assert monitoring.relabelled({"a": "x", "b": "y"}, configs) is None
    configs[1]["regex"] = "y-."
    assert monitoring.relabelled({"a": "x", "b": "y"}, configs) == {"a": "x", "b": "y", "c": "y-x"}
