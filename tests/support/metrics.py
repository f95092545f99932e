"""The metrics pages of a running cluster, as Prometheus asks for them."""

import asyncio
import urllib.request
from collections.abc import Mapping

from prometheus_client import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from local.cluster import metrics_of
from tests.support.cluster import LocalCluster

_SUFFIXES = {
    "counter": ("_total",),
    "gauge": ("",),
    "histogram": ("_bucket", "_sum", "_count"),
    "info": ("_info",),
}

_ACCEPT = {"Accept": "application/openmetrics-text; version=1.0.0"}


async def page_of(cluster: LocalCluster, service: str, *, as_text: bool = False) -> str:
    """The page of one of its services, in the format that has exemplars, or in Prometheus' older one."""
    port = cluster.plan().record.ports[metrics_of(service)]
    return await asyncio.to_thread(_get, f"http://127.0.0.1:{port}/metrics", {} if as_text else _ACCEPT)


async def total_of(port: int, counter: str) -> float:
    """What a counter without labels has come to, on the page at a port."""
    page = await asyncio.to_thread(_get, f"http://127.0.0.1:{port}/metrics")
    (family,) = (one for one in text_string_to_metric_families(page) if one.name == counter)  # type: ignore[no-untyped-call]
    return float(family.samples[0].value)


async def sum_of(port: int, counter: str) -> float:
    """What a counter has come to over all its labels, on the page at a port."""
    page = await asyncio.to_thread(_get, f"http://127.0.0.1:{port}/metrics")
    families = text_string_to_metric_families(page)  # type: ignore[no-untyped-call]
    samples = [sample for one in families if one.name == counter for sample in one.samples]
    return sum(float(sample.value) for sample in samples if sample.name == f"{counter}_total")


async def families_of(cluster: LocalCluster, service: str) -> dict[str, Metric]:
    """The same, parsed, by name."""
    return {
        family.name: family
        for family in text_string_to_metric_families(await page_of(cluster, service))  # type: ignore[no-untyped-call]
    }


async def names_of(cluster: LocalCluster) -> set[str]:
    """Every name that a query may use, of all services. What has not happened yet has a family, and no samples."""
    ports = cluster.plan().record.ports
    services = [name.removesuffix("-metrics") for name in ports if name.endswith("-metrics")]
    families = [await families_of(cluster, service) for service in services]
    return {
        f"{family.name}{suffix}" for found in families for family in found.values() for suffix in _SUFFIXES[family.type]
    }


def _get(url: str, headers: Mapping[str, str] = _ACCEPT) -> str:
    with urllib.request.urlopen(urllib.request.Request(url, headers=dict(headers)), timeout=10) as answer:
        text: str = answer.read().decode()
    return text
