"""What is in deploy/monitoring, and whom Prometheus would scrape by it."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.deploy.kubernetes import Manifest, Workload, of_kind, selects

DIRECTORY = Path(__file__).resolve().parents[2] / "deploy" / "monitoring"

JOBS = {"router": "memshard-router", "shard": "memshard-shard", "replica": "memshard-replica"}
"""The names by which the rules and the dashboard know the services."""


def scrape_config(file: str) -> Manifest:
    """The one scrape job of a configuration of Prometheus."""
    (config,) = yaml.safe_load((DIRECTORY / "prometheus" / file).read_text())["scrape_configs"]
    assert isinstance(config, dict)
    return config


def relabelled(labels: Mapping[str, str], configs: list[dict[str, Any]]) -> dict[str, str] | None:
    """A target's labels after relabelling, as Prometheus does it; None when it is not kept."""
    found = dict(labels)
    for config in configs:
        value = ";".join(found.get(name, "") for name in config["source_labels"])
        match = re.fullmatch(config.get("regex", "(.*)"), value)
        action = config.get("action", "replace")
        assert action in {"keep", "replace"}, config
        if action == "keep" and match is None:
            return None
        if action == "replace" and match is not None:
            found[config["target_label"]] = match.expand(config.get("replacement", "$1").replace("$", "\\"))
    return found


def alertmanager() -> Manifest:
    """Alertmanager's configuration."""
    config = yaml.safe_load((DIRECTORY / "alertmanager" / "alertmanager.yml").read_text())
    assert isinstance(config, dict)
    return config


def inhibited(alert: Mapping[str, str], firing: Mapping[str, str], rules: list[Manifest]) -> bool:
    """Whether nobody hears of an alert while another fires, by Alertmanager's inhibit rules. A label that is not there
    is an empty one, so that two alerts that lack a label of `equal` have it in common.
    """
    return any(
        all(_matches(matcher, firing) for matcher in rule["source_matchers"])
        and all(_matches(matcher, alert) for matcher in rule["target_matchers"])
        and all(alert.get(label, "") == firing.get(label, "") for label in rule.get("equal", []))
        for rule in rules
    )


def _matches(matcher: str, labels: Mapping[str, str]) -> bool:
    parsed = re.fullmatch(r'(\w+)(=~|!~|!=|=)"?([^"]*)"?', matcher)
    assert parsed, matcher
    label, operator, value = parsed.groups()
    pattern = value if "~" in operator else re.escape(value)
    return (re.fullmatch(pattern, labels.get(label, "")) is not None) is not operator.startswith("!")


def scraped_by_pod(pod: Workload, config: Manifest) -> dict[str, dict[str, str]]:
    """The ports of a pod that are scraped, by name, with their labels."""
    assert config["honor_labels"], "a shard's name would be there twice"
    found = {}
    for name in pod.ports():
        meta = {"__meta_kubernetes_pod_container_port_name": name, **_meta(pod), "job": config["job_name"]}
        if (kept := relabelled(meta, config["relabel_configs"])) is not None:
            found[name] = {label: value for label, value in kept.items() if not label.startswith("__")}
    return found


def pod_labels(pod: Workload, endpoint: Manifest) -> dict[str, str]:
    """The labels that a ServiceMonitor's endpoint gives what it scrapes of a pod, besides the operator's own."""
    assert endpoint["honorLabels"], "a shard's name would be there twice"
    configs = [{"source_labels": c["sourceLabels"], "target_label": c["targetLabel"]} for c in endpoint["relabelings"]]
    kept = relabelled(_meta(pod), configs)
    assert kept is not None
    return {label: value for label, value in kept.items() if not label.startswith("__")}


def _meta(pod: Workload) -> dict[str, str]:
    labels = {f"__meta_kubernetes_pod_label_{re.sub('[^a-zA-Z0-9_]', '_', k)}": v for k, v in pod.labels.items()}
    namespace = pod.manifest["metadata"]["namespace"]
    return {"__meta_kubernetes_pod_name": "pod-0", "__meta_kubernetes_namespace": namespace, **labels}


def scraped_by_monitor(monitor: Manifest, among: tuple[Manifest, ...]) -> list[tuple[Manifest, str, str]]:
    """The Services that a ServiceMonitor finds, each with the port's name and the job's."""
    spec = monitor["spec"]
    return [
        (service, endpoint["port"], service["metadata"]["labels"][spec["jobLabel"]])
        for service in of_kind(among, "Service")
        if selects(spec["selector"], service["metadata"]["labels"])
        for endpoint in spec["endpoints"]
        if endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
    ]
