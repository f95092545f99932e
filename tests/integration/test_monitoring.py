"""The rules and the dashboard in deploy/monitoring, against what a running cluster has on its pages."""

import asyncio
import json
import math
import os
import re
import secrets
import shutil
import signal
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
import pytest_asyncio

from memshard.v1 import memory_pb2 as pb
from tests.support.cluster import LocalCluster, free_port
from tests.support.eventually import eventually
from tests.support.metrics import families_of, names_of, page_of
from tests.support.promql import MONITORING, RULES, labels_in, metrics_in, panels, rules, selectors_in, targets
from tests.support.traced import receiving_traces
from tests.support.wire import memory_service, store_request

if TYPE_CHECKING:
    from memshard.v1.memory_pb2_grpc import MemoryServiceAsyncStub

# What Prometheus itself adds, and what kubelets say of volumes, which are nowhere but in Kubernetes: tests/deploy has
# these fire, and sees that they are asked for volumes that there are.
OF_PROMETHEUS = {"up"}
OF_KUBELETS = {"kubelet_volume_stats_available_bytes", "kubelet_volume_stats_capacity_bytes"}

SERVICES = 5
EMPTY_WHEN_ALL_IS_WELL = {
    "Levels other than normal",
    "Breakers that are not closed",
    "Failures, by server",
    "Moves that are not over, by step",
    "Time to make an own index, p99 of a day",
}
"""Panels that show trouble, or work that is under way: what they look at is there all the same."""

_STATUS = re.compile(r'\w*status\w*(?:=~|!=)"[^"]*"')


@dataclass(frozen=True)
class Watched:
    """A cluster of two shards with a replica each, whose traces somebody receives."""

    cluster: LocalCluster
    api: "MemoryServiceAsyncStub"


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def watched() -> AsyncIterator[Watched]:
    cluster = LocalCluster(shards=2, replicas=1, options=["--hung-after", "0"])
    async with receiving_traces(cluster), memory_service(cluster.address) as api:
        yield Watched(cluster, api)


@asynccontextmanager
async def load(api: "MemoryServiceAsyncStub") -> AsyncIterator[None]:
    """Calls of every kind meanwhile, for several users, one of each round refused."""

    async def calls() -> None:
        for number in range(1_000_000):
            await use(api, f"user-{number % 16}")
            await asyncio.sleep(0.05)

    task = asyncio.create_task(calls())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])
    assert task.cancelled(), task.exception()


async def use(api: "MemoryServiceAsyncStub", user: str) -> None:
    stored = (await api.StoreMemory(store_request(user, "Alice drinks green tea"))).memory
    await api.GetMemory(pb.GetMemoryRequest(id=stored.id))
    await api.GetMemory(pb.GetMemoryRequest(id=stored.id, user_id=user))
    await api.ListMemories(pb.ListMemoriesRequest(user_id=user, page_size=5))
    await api.SearchMemories(pb.SearchMemoriesRequest(user_id=user, query="tea"))
    await api.BatchStoreMemories(pb.BatchStoreMemoriesRequest(memories=[pb.Memory(user_id=user, content="Bob")]))
    await api.DeleteMemory(pb.DeleteMemoryRequest(id=stored.id, user_id=user))
    with pytest.raises(grpc.aio.AioRpcError):
        await api.SearchMemories(pb.SearchMemoriesRequest(user_id=user))


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


def test_selectors_and_labels_are_found_in_queries() -> None:
    query = 'label_replace(max by (a, b) (rate(x{j="y", z=~"u{2}|d"}[5m])) unless on (c) up, "c", "$1", "up", "")'
    assert selectors_in(query) == ['x{j="y", z=~"u{2}|d"}', "up"]
    assert labels_in(query) == {"a", "b", "c"}


async def test_every_metric_that_a_rule_or_a_panel_names_is_there(watched: Watched) -> None:
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    there = recorded | OF_PROMETHEUS | OF_KUBELETS | await names_of(watched.cluster)
    queries = [*panels(), *((rule.get("alert") or rule["record"], rule["expr"]) for rule in rules())]
    assert len(queries) > 50
    missing = {title: names - there for title, query in queries if (names := metrics_in(query)) - there}
    assert not missing


async def test_every_metric_of_ours_is_documented(watched: Watched) -> None:
    page = (MONITORING.parents[1] / "docs" / "observability.md").read_text()
    services = ("router-0", "shard-0", "shard-0-replica-1")
    found = {family for service in services for family in await families_of(watched.cluster, service)}
    ours = {name for name in found if not name.startswith(("process_", "python_"))}
    assert len(ours) > 50
    assert {name for name in ours if not {f"`{name}`", f"`{name}_total`"} & set(re.findall("`[a-z_]+`", page))} == set()


def test_promtool_finds_nothing_wrong_with_the_rules() -> None:
    checked_by_promtool("rules", *map(str, RULES))


async def test_promtool_finds_nothing_wrong_with_the_pages(watched: Watched) -> None:
    await use(watched.api, "somebody")
    for service in ("router-0", "shard-0", "shard-0-replica-1"):
        page = await page_of(watched.cluster, service, as_text=True)
        assert "# TYPE process_cpu_seconds_total counter" in page
        checked_by_promtool("metrics", given=page)


def checked_by_promtool(*what: str, given: str = "") -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian's package prometheus has it)")
    done = subprocess.run(
        [promtool, "check", *what], input=given, check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.timeout(180)
async def test_every_query_finds_something_or_what_it_watches_is_there(watched: Watched, tmp_path: Path) -> None:
    async with prometheus(watched.cluster, tmp_path) as url, load(watched.api):
        await eventually(lambda: all_up(url, SERVICES), within_s=60)
        loaded = await ask(url, "rules")
        states = [rule for group in loaded["groups"] for rule in group["rules"]]
        assert len(states) == len(rules())
        await eventually(lambda: evaluated(url), within_s=60)
        # The sizes of databases are looked up every 15 s, and rates are of two looks.
        for title, target in targets():
            if title not in EMPTY_WHEN_ALL_IS_WELL and not metrics_in(target["expr"]) & OF_KUBELETS:
                await eventually(partial(shown, url, title, target), within_s=30)
        for query in [*(query for _, query in panels()), *(rule["expr"] for rule in rules())]:
            await ask(url, "query", query=filled_in(query))
            if not metrics_in(query) & OF_KUBELETS:
                await there(url, filled_in(query))
        slots = await ask(url, "query", query="sum(memory_shard_slots)")
        assert float(slots["result"][0]["value"][1]) == 16_384
        assert not {alert for alert, _ in await firing(url)}


def filled_in(query: str) -> str:
    """A panel's query, as Grafana asks it of all shards."""
    return query.replace("$__rate_interval", "1m").replace("$shard", ".*")


async def shown(url: str, title: str, target: dict[str, Any]) -> bool:
    """Whether a panel has a number to show, and all that its legend names. AssertionError otherwise."""
    found = await ask(url, "query", query=filled_in(target["expr"]))
    series = found["result"]
    assert any(not math.isnan(float(each["value"][1])) for each in series), f"{title}: {target['expr']} has {series}"
    labels = re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])
    nameless = [each["metric"] for each in series if not all(each["metric"].get(label) for label in labels)]
    assert not nameless, f"{title}: no {labels} in {nameless}"
    return True


async def there(url: str, query: str) -> None:
    """Asserts that each selector of a query finds something, and that there are the labels which it groups by."""
    labels: set[str] = set()
    for selector in selectors_in(query):
        # A status that no call has ended with yet has no series.
        series = (await ask(url, "query", query=_STATUS.sub("", selector)))["result"]
        assert series, f"{selector} finds nothing"
        labels.update(*(each["metric"] for each in series))
    assert labels_in(query) <= labels, query


@pytest.mark.timeout(180)
async def test_a_call_whose_trace_is_kept_is_an_exemplar_of_its_latency(watched: Watched, tmp_path: Path) -> None:
    stored = (await watched.api.StoreMemory(store_request("user-0", "Carol bakes"))).memory
    trace_id = secrets.token_hex(16)
    await watched.api.ListMemoryVersions(
        pb.ListMemoryVersionsRequest(id=stored.id, user_id="user-0"),
        metadata=(("traceparent", f"00-{trace_id}-{secrets.token_hex(8)}-01"),),
    )
    lines = [line for line in (await page_of(watched.cluster, "router-0")).splitlines() if trace_id in line]
    (bucket,) = [line for line in lines if line.startswith("memory_operation_duration_seconds_bucket{")]
    assert 'operation="ListMemoryVersions"' in bucket
    assert f'# {{trace_id="{trace_id}"}}' in bucket

    (query,) = [target["expr"] for title, target in targets() if title == "p99 by operation"]
    async with prometheus(watched.cluster, tmp_path) as url:
        await eventually(lambda: linked(url, filled_in(query), trace_id), within_s=60)


async def linked(url: str, query: str, trace_id: str) -> bool:
    """Whether Grafana, which asks so for a panel's points, gets one that leads to this trace."""
    now = time.time()
    text = await asyncio.to_thread(
        _get, f"{url}/api/v1/query_exemplars?{urllib.parse.urlencode({'query': query, 'start': now - 600, 'end': now})}"
    )
    found = [exemplar for each in json.loads(text)["data"] for exemplar in each["exemplars"]]
    return trace_id in {exemplar["labels"]["trace_id"] for exemplar in found}


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
        "--enable-feature=exemplar-storage",
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
@pytest.mark.parametrize("how", ["hangs", "is killed"])
async def test_a_shard_that_is_away_fires_its_alert_and_the_alert_resolves(
    watched: Watched, tmp_path: Path, how: str
) -> None:
    async with prometheus(watched.cluster, tmp_path) as url:
        await eventually(lambda: all_up(url, SERVICES), within_s=60)
        assert ("MemshardDown", "shard-1") not in await firing(url)
        with away(watched.cluster, "shard-1", killed=how == "is killed"):
            await eventually(lambda: fires(url, "MemshardDown", "shard-1"), within_s=20)
            assert {shard for name, shard in await firing(url) if name == "MemshardDown"} == {"shard-1"}
        await eventually(lambda: fires(url, "MemshardDown", None), within_s=30)
    await eventually(watched.cluster.healthy, within_s=60)


@contextmanager
def away(cluster: LocalCluster, service: str, *, killed: bool) -> Iterator[None]:
    """The service hangs meanwhile; or is dead, and whoever would start it again is held."""
    held = cluster.kill("supervisor" if killed else service, signal.SIGSTOP)
    try:
        if killed:
            cluster.kill(service)
        yield
    finally:
        os.kill(held, signal.SIGCONT)


async def firing(url: str) -> set[tuple[str, str]]:
    """The alerts that fire, and of which shard: Alertmanager goes by that."""
    alerts = (await ask(url, "alerts"))["alerts"]
    return {
        (alert["labels"]["alertname"], alert["labels"].get("shard", ""))
        for alert in alerts
        if alert["state"] == "firing"
    }


async def fires(url: str, name: str, shard: str | None) -> bool:
    """Whether this alert fires of this shard; with None, whether it fires of none."""
    found = {of for alert, of in await firing(url) if alert == name}
    return shard in found if shard else not found
