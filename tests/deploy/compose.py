"""The compose files, merged as compose merges them, and what it would put into each service's environment."""

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

DIRECTORY = Path(__file__).resolve().parents[2] / "deploy" / "compose"
FILE = DIRECTORY / "docker-compose.yaml"
LOCAL = DIRECTORY / "docker-compose.local.yaml"

Document = dict[str, Any]


def example_environment() -> dict[str, str]:
    """What .env.example says."""
    lines = (line for line in (DIRECTORY / ".env.example").read_text().splitlines() if line and line[0] != "#")
    return dict(line.split("=", 1) for line in lines)


@cache
def load(file: Path) -> Document:
    """A compose file with the example's environment filled in."""
    document = _filled(yaml.safe_load(file.read_text()), example_environment())
    assert isinstance(document, dict)
    return document


def _filled(value: Any, environment: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _filled(each, environment) for key, each in value.items()}
    if isinstance(value, list):
        return [_filled(each, environment) for each in value]
    return _interpolated(value, environment) if isinstance(value, str) else value


def _interpolated(text: str, environment: Mapping[str, str]) -> str:
    """`${NAME}`, `${NAME:-default}`, `${NAME:?}` and `$$`, as compose has them."""

    def replaced(match: re.Match[str]) -> str:
        if match[0] == "$$":
            return "$"
        name, operator, default = match[1], match[2], match[3]
        if operator == ":?":
            assert environment.get(name), f"{name} is not in .env.example"
        return environment.get(name) or (default if operator == ":-" else "") or ""

    return re.sub(r"\$\$|\$\{([A-Z0-9_]+)(?:(:[-?])([^}]*))?\}", replaced, text)


def command() -> tuple[str, ...] | None:
    """Compose, new or old; None where there is neither."""
    if shutil.which("docker"):
        found = subprocess.run(["docker", "compose", "version"], capture_output=True, check=False, timeout=30)
        if found.returncode == 0:
            return ("docker", "compose")
    return ("docker-compose",) if shutil.which("docker-compose") else None


def run(
    *arguments: str, files: tuple[Path, ...], variables: Mapping[str, str], timeout_s: float = 60
) -> subprocess.CompletedProcess[str]:
    """A compose command on these files, which must succeed."""
    program = command()
    assert program is not None
    named = [part for file in files for part in ("-f", str(file))]
    done = subprocess.run(
        [*program, *named, *arguments],
        cwd=DIRECTORY,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, f"{' '.join(arguments)}:\n{done.stdout}\n{done.stderr}"
    return done
