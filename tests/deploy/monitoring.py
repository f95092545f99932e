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


def scraped_by_pod(pod: Workload, config: Manifest) -> dict[str, str]:
    """The ports of a pod that are scraped, by name, with the jobs' names."""
    found = {}
    for name in pod.ports():
        labels = {f"__meta_kubernetes_pod_label_{re.sub('[^a-zA-Z0-9_]', '_', k)}": v for k, v in pod.labels.items()}
        meta = {"__meta_kubernetes_pod_container_port_name": name, "__meta_kubernetes_pod_name": "pod-0", **labels}
        if (kept := relabelled({**meta, "job": config["job_name"]}, config["relabel_configs"])) is not None:
            assert kept["service"] == "pod-0"
            found[name] = kept["job"]
    return found


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
