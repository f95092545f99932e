"""One set of rules and dashboards, wherever the cluster runs; and Prometheus finds every service there."""

import json
import re
import runpy
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from common import dsn
from tests.deploy import compose, monitoring
from tests.deploy.compose import FILE
from tests.deploy.kubernetes import OVERLAYS, Workload, named, of_kind, render, workloads
from tests.deploy.monitoring import DIRECTORY, JOBS, pod_labels, scrape_config, scraped_by_monitor, scraped_by_pod
from tests.deploy.settings import service_of, settings_of
from tests.support.promql import metrics_in, panels, rules, targets

PRODUCTION = OVERLAYS[0]
SCHEMA = yaml.safe_load(Path(__file__).with_name("prometheus_operator_schema.yaml").read_text())
RULE_TESTS = sorted((DIRECTORY / "prometheus" / "tests").glob("*.yml"))
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


# What the rules say.


@pytest.mark.parametrize("file", RULE_TESTS, ids=lambda file: str(file.stem))
def test_alerts_fire_when_they_should_and_no_others(file: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian's package prometheus has it)")
    done = subprocess.run(
        [promtool, "test", "rules", str(file)], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_seen_to_fire_and_to_be_silent() -> None:
    tests = [test for file in RULE_TESTS for test in yaml.safe_load(file.read_text())["tests"]]
    cases = [case for test in tests for case in test.get("alert_rule_test", [])]
    alerts = {rule["alert"] for rule in rules() if "alert" in rule}
    assert {case["alertname"] for case in cases if case["exp_alerts"]} == alerts
    assert {case["alertname"] for case in cases if not case["exp_alerts"]} == alerts


ALERTMANAGER = DIRECTORY / "alertmanager" / "alertmanager.yml"


def test_amtool_finds_nothing_wrong_with_alertmanagers_configuration() -> None:
    amtool("check-config", str(ALERTMANAGER))


@pytest.mark.parametrize("rule", [rule for rule in rules() if "alert" in rule], ids=lambda rule: str(rule["alert"]))
def test_every_alert_goes_to_the_pager_or_by_mail(rule: dict[str, Any]) -> None:
    severity = rule["labels"]["severity"]
    receiver = {"page": "pager", "ticket": "mail"}[severity]
    labels = f"alertname={rule['alert']}", f"severity={severity}"
    amtool("config", "routes", "test", f"--config.file={ALERTMANAGER}", f"--verify.receivers={receiver}", *labels)


def amtool(*arguments: str) -> None:
    program = shutil.which("amtool")
    if program is None:
        pytest.skip("amtool is not installed (Debian's package prometheus-alertmanager has it)")
    done = subprocess.run([program, *arguments], check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_shard_that_is_away_hides_what_follows_from_it_and_nothing_else() -> None:
    rules = monitoring.alertmanager()["inhibit_rules"]
    known = re.findall(r"alert: (\w+)", "".join(file.read_text() for file in RULES))
    assert set(re.findall(r"Memshard\w+", str(rules))) <= set(known)

    def heard(alert: str, firing: dict[str, str], /, **labels: str) -> bool:
        return not monitoring.inhibited({"alertname": alert, **labels}, firing, rules)

    down = {"alertname": "MemshardDown", "job": "memshard-shard", "service": "pod-x", "shard": "shard-1"}
    for away in (down, {"alertname": "MemshardShardMissing", "shard": "shard-1"}):
        assert not heard("MemshardBreakerOpen", away, name="shard-1", kind="store", shard="shard-1")
        assert not heard("MemshardDegraded", away, of="shard-1", level="reduced", shard="shard-1")
        assert heard("MemshardBreakerOpen", away, name="shard-2", kind="store", shard="shard-2")
        assert heard("MemshardBreakerOpen", away, name="shard-1/shard-1-r1", kind="search")
        assert heard("MemshardBreakerOpen", away, name="Redis", kind="all")
        assert heard("MemshardDegraded", away, of="cluster", level="reduced")
        assert heard("MemshardUnavailableFast", away)
        assert heard("MemshardNoQuorum", away, shard="shard-2")
        assert heard(away["alertname"], away, **{k: v for k, v in away.items() if k != "alertname"})

    router = {"alertname": "MemshardDown", "job": "memshard-router", "service": "router-0"}
    assert heard("MemshardBreakerOpen", router, name="shard-1", kind="store", shard="shard-1")
    assert heard("MemshardBreakerOpen", router, name="Redis", kind="all")
    assert heard("MemshardDegraded", router, of="cluster", level="reduced")
    assert heard("MemshardUnavailableFast", router)
    nobody = {"alertname": "MemshardNoRouter"}
    assert not heard("MemshardDown", nobody, job="memshard-router", service="router-0")
    assert heard("MemshardDown", nobody, **{k: v for k, v in down.items() if k != "alertname"})


# What the dashboard asks.

NOT_SHOWN = {
    "memory_operations_in_flight": "those of each server are shown, with their limit",
    "rpc_client_call_duration_seconds": "how long servers take is shown by server, which this leaves out",
}
"""Documented metrics that no panel shows and no rule goes by, with the reason."""


def documented() -> set[str]:
    """The names in docs/observability.md's table of metrics, but for the process's own."""
    page = (DIRECTORY.parents[1] / "docs" / "observability.md").read_text()
    _, *rows = page[page.index("| metric | of | labels |") : page.index("| `process_*` |")].splitlines()
    return {name for row in rows for name in re.findall("`([a-z_]+)`", row.split("|")[1])}


def test_every_metric_is_shown_or_watched_or_has_a_reason_why_not() -> None:
    queries = [*(query for _, query in panels()), *(rule["expr"] for rule in rules())]
    named = {name for query in queries for name in metrics_in(query)}
    seen = named | {re.sub("_(bucket|sum|count)$", "", name) for name in named}
    assert len(documented()) > 50
    assert documented() - seen == NOT_SHOWN.keys()


def test_points_that_lead_to_traces_are_asked_of_what_has_them() -> None:
    # Recorded series have none, and of those that services have these two (common/telemetry/calls.py).
    have = {"memory_operation_duration_seconds_bucket", "memory_operations_total"}
    asked = {title: metrics_in(target["expr"]) for title, target in targets() if target["exemplar"]}
    assert asked.keys() == {"p99 by operation", "Calls that failed, by status"}
    assert all(names <= have for names in asked.values())


def test_a_shard_that_is_chosen_is_that_one_with_its_replicas() -> None:
    selectors = {pattern for _, t in targets() for pattern in re.findall(r'(?:server|shard)=~"([^"]*)"', t["expr"])}
    assert len(selectors) == 2
    for selector in selectors:
        chosen = re.compile(selector.replace("$shard", "shard-1"))
        assert chosen.fullmatch("shard-1")
        assert not chosen.fullmatch("shard-10")
        assert not chosen.fullmatch("shard-10/shard-10-replica-1")
    of_servers = re.compile(next(s for s in selectors if s != "$shard").replace("$shard", "shard-1"))
    assert of_servers.fullmatch("shard-1/shard-1-replica-1")
    assert re.fullmatch(of_servers.pattern.replace("shard-1", ".*"), "shard-1/shard-1-replica-1")


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
            of_shard = {} if service == "router" else {"shard": settings.shard_id}
            wanted[f"{name}:{settings.metrics_port}"] = {"job": JOBS[service], "service": name, **of_shard}
    assert asked == wanted
    assert len(asked) == 6


def test_a_shard_of_compose_sees_the_room_on_its_primarys_volume() -> None:
    services: dict[str, Any] = compose.load(FILE)["services"]
    seen = set()
    for name, service in services.items():
        if service_of(service.get("command", [])) == "shard":
            settings = settings_of("shard", service["environment"])
            (mount,) = service["volumes"]
            volume, path, options = mount.split(":")
            assert (path, options) == (str(settings.data_path), "ro")
            primary, _ = dsn.hosts(settings.database_dsn.get_secret_value())[0]
            assert any(mount.startswith(f"{volume}:/var/lib/postgresql") for mount in services[primary]["volumes"])
            seen.add(name)
    assert seen == {"shard-0", "shard-1"}


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
        assert pod_labels(workload, monitor["spec"]["endpoints"][0]) == of_pod(kind, settings)
        behind[named(workload.manifest)] += 1
    assert behind == {named(workload.manifest): 1 for workload, _, _ in pods(PRODUCTION)}
    # A port that nothing has is scraped by nobody, and says nothing of it.
    assert {endpoint["port"] for endpoint in monitor["spec"]["endpoints"]} == {port for _, port, _ in found}


@pytest.mark.parametrize("directory", OVERLAYS)
def test_a_prometheus_without_its_operator_finds_the_same(directory: str) -> None:
    config = scrape_config("prometheus-kubernetes.yml")
    known = {
        named(workload.manifest): {
            "job": JOBS[service],
            "namespace": workload.manifest["metadata"]["namespace"],
            **of_pod(service, settings),
        }
        for workload, service, settings in pods(directory)
    }
    for workload in workloads(render(directory)):
        labels = known.get(named(workload.manifest))
        assert scraped_by_pod(workload, config) == ({"metrics": labels} if labels else {})


def of_pod(service: str, settings: Any) -> dict[str, str]:
    """What a target's labels have to say of the pod: of what does not answer, nothing else says it."""
    return {"service": "pod-0", "shard": "" if service == "router" else settings.shard_id}


@pytest.mark.parametrize("directory", OVERLAYS)
def test_the_volumes_of_every_database_are_watched_each_by_its_name(directory: str) -> None:
    """CloudNativePG calls an instance as its cluster with a number, and its volumes as the instance."""
    (rule,) = [rule for rule in rules() if rule.get("alert") == "MemshardVolumeFull"]
    (panel,) = [t["expr"] for title, t in targets() if title == "Disk free" and "kubelet" in t["expr"]]
    (watched, shown) = (re.findall(r'persistentvolumeclaim=~"([^"]+)"', query)[0] for query in (rule["expr"], panel))
    (of_shard,) = re.findall(r'"persistentvolumeclaim", "([^"]+)"', rule["expr"])
    manifests = render(directory)
    databases = [(each, each["metadata"]["labels"].get("memshard.io/shard")) for each in of_kind(manifests, "Cluster")]
    # The catalog's is of no shard.
    assert {shard for _, shard in databases} > {None}
    for database, shard in databases:
        for volume in (f"{database['metadata']['name']}-1", f"{database['metadata']['name']}-12-wal"):
            assert re.fullmatch(watched, volume)
            assert re.fullmatch(shown.replace("$shard", shard or ".*"), volume)
            found = re.fullmatch(of_shard, volume)
            assert (found and found[1]) == shard
    assert not re.fullmatch(shown.replace("$shard", "shard-1"), "shard-10-postgres-1")


def test_what_the_operator_and_grafana_get_is_what_the_others_get() -> None:
    manifests = render(PRODUCTION)
    (dashboards,) = [m for m in of_kind(manifests, "ConfigMap") if "grafana_dashboard" in m["metadata"]["labels"]]
    files = {file.name: file.read_text() for file in (DIRECTORY / "grafana" / "dashboards").glob("*.json")}
    assert dashboards["data"] == files
    groups = [group for manifest in of_kind(manifests, "PrometheusRule") for group in manifest["spec"]["groups"]]
    assert groups == [group for file in RULES for group in yaml.safe_load(file.read_text())["groups"]]
    for manifest in of_kind(manifests, "ServiceMonitor", "PrometheusRule"):
        jsonschema.validate(manifest, SCHEMA)


STACK: dict[str, Any] = yaml.safe_load((DIRECTORY.parent / "k8s" / "kube-prometheus-stack.yaml").read_text())
"""Values for the chart that Prometheus, Alertmanager and Grafana come with in Kubernetes."""


def test_the_operators_alertmanager_gets_the_same_routes(tmp_path: Path) -> None:
    ours, theirs = monitoring.alertmanager(), STACK["alertmanager"]["config"]
    watchdog, route = theirs["route"]["routes"]
    assert route == {"matchers": ['alertname=~"Memshard.+"'], **ours["route"]}
    assert [rule for rule in theirs["inhibit_rules"] if "Memshard" in str(rule)] == ours["inhibit_rules"]
    assert theirs["receivers"] == [{"name": "null"}, *ours["receivers"]]
    assert (watchdog["matchers"], watchdog["receiver"]) == (['alertname="Watchdog"'], "null")
    # As the chart has it.
    config = {**theirs, "route": {"receiver": "null", "group_by": ["namespace"], **theirs["route"]}}
    file = tmp_path / "alertmanager.yml"
    file.write_text(yaml.safe_dump(config))
    amtool("check-config", str(file))
    for alert, severity, receiver in (
        ("MemshardDown", "page", "pager"),
        ("MemshardDegraded", "ticket", "mail"),
        ("Watchdog", "none", "null"),
    ):
        labels = f"alertname={alert}", f"severity={severity}"
        amtool("config", "routes", "test", f"--config.file={file}", f"--verify.receivers={receiver}", *labels)


def test_grafana_finds_the_dashboard_and_from_its_points_the_traces() -> None:
    grafana = STACK["grafana"]
    assert grafana["sidecar"]["dashboards"] == {"searchNamespace": "ALL"}
    provisioned = DIRECTORY / "grafana" / "provisioning" / "datasources" / "prometheus.yml"
    prometheus, jaeger = yaml.safe_load(provisioned.read_text())["datasources"]
    (leads,) = prometheus["jsonData"]["exemplarTraceIdDestinations"]
    told = grafana["sidecar"]["datasources"]["exemplarTraceIdDestinations"]
    assert (told["traceIdLabelName"], told["datasourceUid"]) == (leads["name"], leads["datasourceUid"])
    (source,) = grafana["additionalDataSources"]
    assert {**source, "url": jaeger["url"]} == jaeger
    assert "exemplar-storage" in STACK["prometheus"]["prometheusSpec"]["enableFeatures"]


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
