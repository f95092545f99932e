"""The rules and the dashboard in deploy/monitoring, against what a running cluster has on its pages."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.cluster import LocalCluster, free_port
from tests.support.eventually import eventually
from tests.support.metrics import names_of
from tests.support.promql import MONITORING, RULES, metrics_in, panels, rules

# What Prometheus itself adds.
OF_PROMETHEUS = {"up"}


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ('sum by (a, b) (rate(x_total{job="y", z=~"up|down"}[5m]))', {"x_total"}),
        ("histogram_quantile(0.99, sum by (le) (rate(a_bucket[5m]))) > 14.4 * 0.001", {"a_bucket"}),
        ('a:b:c1h > 1 and on (shard) count by (shard) (d{e="f{g}"}) > 0', {"a:b:c1h", "d"}),
        ('sum(up{job="x"}) == 0 unless bool_metric', {"up", "bool_metric"}),
        ("rate(process_cpu_seconds_total[$__rate_interval])", {"process_cpu_seconds_total"}),
    ],
)
def test_metrics_are_found_in_queries(query: str, expected: set[str]) -> None:
    assert metrics_in(query) == expected


async def test_every_metric_that_a_rule_or_a_panel_names_is_there(cluster: LocalCluster) -> None:
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    there = recorded | OF_PROMETHEUS | await names_of(cluster)
    queries = [*panels(), *((rule.get("alert") or rule["record"], rule["expr"]) for rule in rules())]
    assert len(queries) > 50
    missing = {title: names - there for title, query in queries if (names := metrics_in(query)) - there}
    assert not missing


def test_promtool_finds_nothing_wrong_with_the_rules() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian's package prometheus has it)")
    done = subprocess.run(
        [promtool, "check", "rules", *map(str, RULES)], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.timeout(180)
async def test_prometheus_scrapes_all_services_and_answers_every_query(cluster: LocalCluster, tmp_path: Path) -> None:
    async with prometheus(cluster, tmp_path) as url:
        await eventually(lambda: all_up(url, 4), within_s=60)
        loaded = await ask(url, "rules")
        states = [rule for group in loaded["groups"] for rule in group["rules"]]
        assert len(states) == len(rules())
        await eventually(lambda: evaluated(url), within_s=60)
        for title, query in panels():
            text = query.replace("$__rate_interval", "1m").replace("$shard", ".*")
            assert (await ask(url, "query", query=text))["resultType"] in {"vector", "scalar"}, title
        slots = await ask(url, "query", query="sum(memory_shard_slots)")
        assert float(slots["result"][0]["value"][1]) == 16_384


async def all_up(url: str, count: int) -> bool:
    targets = (await ask(url, "targets"))["activeTargets"]
    return len(targets) == count and all(target["health"] == "up" for target in targets)


async def evaluated(url: str) -> bool:
    """Whether every rule has been, without an error."""
    groups = (await ask(url, "rules"))["groups"]
    return all(rule["health"] == "ok" for group in groups for rule in group["rules"])


@asynccontextmanager
async def prometheus(cluster: LocalCluster, folder: Path) -> AsyncIterator[str]:
    """A Prometheus that scrapes the cluster each second, with our rules; its address."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("Prometheus is not installed (Debian's package prometheus)")
    text = (MONITORING / "prometheus" / "prometheus.yml").read_text()
    text = text.replace("15s", "1s").replace("targets/*.json", str(cluster.layout.metrics_targets))
    text = text[: text.index("alerting:")] + text[text.index("scrape_configs:") :]
    (folder / "prometheus.yml").write_text(text)
    for file in RULES:
        # Alerts that page after half a minute do after a second here.
        (folder / file.name).write_text(file.read_text().replace("for: 30s", "for: 1s"))
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        program,
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        url = f"http://127.0.0.1:{port}"
        await eventually(lambda: ask(url, "targets"), within_s=30)
        yield url
    finally:
        process.terminate()
        await process.wait()


async def ask(url: str, what: str, **parameters: str) -> dict[str, Any]:
    """The data of an answer of Prometheus' API."""
    text = await asyncio.to_thread(_get, f"{url}/api/v1/{what}?{urllib.parse.urlencode(parameters)}")
    answer: dict[str, Any] = json.loads(text)
    assert answer["status"] == "success", answer
    data: dict[str, Any] = answer["data"]
    return data


def _get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        text: str = answer.read().decode()
    return text


@pytest.mark.timeout(180)
async def test_a_shard_that_is_away_fires_its_alert_and_the_alert_resolves(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    async with prometheus(cluster, tmp_path) as url:
        await eventually(lambda: all_up(url, 4), within_s=60)
        assert ("MemshardDown", "shard-2") not in await firing(url)
        stopped = cluster.kill("shard-2", signal.SIGSTOP)
        try:
            await eventually(lambda: fires(url, "MemshardDown", "shard-2"), within_s=20)
            assert {service for name, service in await firing(url) if name == "MemshardDown"} == {"shard-2"}
        finally:
            os.kill(stopped, signal.SIGCONT)
        await eventually(lambda: fires(url, "MemshardDown", None), within_s=30)
    await eventually(cluster.healthy, within_s=60)


async def firing(url: str) -> set[tuple[str, str]]:
    """The alerts that fire, and of which service."""
    alerts = (await ask(url, "alerts"))["alerts"]
    return {
        (alert["labels"]["alertname"], alert["labels"].get("service", ""))
        for alert in alerts
        if alert["state"] == "firing"
    }


async def fires(url: str, name: str, service: str | None) -> bool:
    """Whether this alert fires of this service; with None, whether it fires of none."""
    found = {of for alert, of in await firing(url) if alert == name}
    return service in found if service else not found
