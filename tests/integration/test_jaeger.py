"""The exporter for Jaeger agents from before OTLP, in an environment of its own: it works with no newer OpenTelemetry
than 1.39.1, and what sends OTLP works with no older protobuf than ours, and so with newer OpenTelemetry."""

import socket
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import asyncio
import sys

from common import tracing
from common.config import RouterSettings
from common.trace_export import exporting

SAMPLED = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


async def main() -> None:
    settings = RouterSettings(catalog_dsn="postgresql://u@h/d")
    async with exporting("router", settings):
        with tracing.received("memshard.v1.MemoryService/SearchMemories", [("traceparent", SAMPLED)], begins=True):
            with tracing.span("fan-out", {"memshard.shards.asked": 3}) as span:
                span.event("retry", {"memshard.attempt": 2})


asyncio.run(main())
"""


@pytest.fixture(scope="module")
def legacy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with the extra `jaeger`, and everything else from this one."""
    folder = tmp_path_factory.mktemp("jaeger")
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["jaeger"]
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, timeout=60)
    python = folder / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *extra]
    done = subprocess.run(install, check=False, capture_output=True, text=True, timeout=100)
    if done.returncode:
        pytest.skip(f"pip cannot install the extra here: {done.stderr.strip().splitlines()[-1:]}")
    others = {sysconfig.get_path("purelib"), *(path for path in sys.path if path.endswith("site-packages"))}
    (site,) = folder.glob("lib/python3*/site-packages")
    # After its own, which come first.
    (site / "others.pth").write_text("\n".join(sorted(others)) + "\n")
    return python


@pytest.mark.timeout(180)
def test_an_agent_on_udp_gets_the_spans(legacy: Path) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as agent:
        agent.bind(("127.0.0.1", 0))
        agent.settimeout(30)
        host, port = agent.getsockname()
        environment = {
            "PYTHONPATH": f"{ROOT}:{ROOT / 'sdk'}",
            "OTEL_TRACES_EXPORTER": "jaeger",
            "OTEL_EXPORTER_JAEGER_AGENT_HOST": host,
            "OTEL_EXPORTER_JAEGER_AGENT_PORT": str(port),
        }
        done = subprocess.run(
            [str(legacy), "-c", PROGRAM], check=False, capture_output=True, text=True, env=environment, timeout=60
        )
        assert done.returncode == 0, done.stderr
        datagram, _ = agent.recvfrom(65_535)
    for expected in (b"memshard-router", b"memshard.v1.MemoryService/SearchMemories", b"fan-out", b"retry"):
        assert expected in datagram
