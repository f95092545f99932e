"""The Kubernetes manifests as kustomize renders them, and what each container would find in its environment."""

import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
K8S = ROOT / "deploy" / "k8s"
OVERLAYS = ("overlays/production", "overlays/small")
JOBS = ("jobs/add-shard", "jobs/rebalance", "jobs/drain-shard", "jobs/remove-shard")

Manifest = dict[str, Any]

# Stands for what is in a Secret. Letters and digits: it becomes a part of URLs.
_SECRET = "s3cret"
# Values of Secrets that are no passwords.
_SECRETS = {("memshard-redis", "url"): f"redis://:{_SECRET}@memshard-redis:6379/0"}


@cache
def render(directory: str) -> tuple[Manifest, ...]:
    """The manifests of an overlay. Skips the test where there is no kustomize."""
    for program in (("kubectl", "kustomize"), ("kustomize", "build")):
        if shutil.which(program[0]):
            break
    else:
        pytest.skip("neither kubectl nor kustomize is here to render the manifests")
    done = subprocess.run([*program, str(K8S / directory)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return tuple(yaml.safe_load_all(done.stdout))


def of_kind(manifests: tuple[Manifest, ...], *kinds: str) -> list[Manifest]:
    """Those of some kinds."""
    return [manifest for manifest in manifests if manifest["kind"] in kinds]


def named(manifest: Manifest) -> str:
    """Kind and name, for messages."""
    return f"{manifest['kind']}/{manifest['metadata']['name']}"


@dataclass(frozen=True)
class Workload:
    """Something with pods: its manifest, and the manifests that it is applied with."""

    manifest: Manifest
    among: tuple[Manifest, ...]

    @property
    def template(self) -> Manifest:
        """The pods' template."""
        template: Manifest = self.manifest["spec"]["template"]
        return template

    @property
    def labels(self) -> dict[str, str]:
        """The pods' labels."""
        labels: dict[str, str] = self.template["metadata"]["labels"]
        return labels

    @property
    def containers(self) -> list[Manifest]:
        """The pods' containers."""
        containers: list[Manifest] = self.template["spec"]["containers"]
        return containers

    def ports(self) -> dict[str, int]:
        """The ports of all containers, by name."""
        return {port["name"]: port["containerPort"] for c in self.containers for port in c.get("ports", ())}

    def environment(self, container: Manifest) -> dict[str, str]:
        """What Kubernetes would put into a container's environment, with `s3cret` for what Secrets hold."""
        found: dict[str, str] = {}
        for source in container.get("envFrom", ()):
            found |= self._config_map(source["configMapRef"]["name"])["data"]
        for variable in container.get("env", ()):
            found[variable["name"]] = self._value(variable, found)
        return found

    def command(self, container: Manifest) -> list[str]:
        """What the image is told to run."""
        environment = self.environment(container)
        return [_expanded(argument, environment) for argument in container.get("args", ())]

    def _value(self, variable: Manifest, before: Mapping[str, str]) -> str:
        if "value" in variable:
            return _expanded(variable["value"], before)
        source = variable["valueFrom"]
        if "secretKeyRef" in source:
            reference = source["secretKeyRef"]
            return _SECRETS.get((reference["name"], reference["key"]), _SECRET)
        path = re.fullmatch(r"metadata\.labels\['(.+)'\]", source["fieldRef"]["fieldPath"])
        assert path, source
        return self.labels[path[1]]

    def _config_map(self, name: str) -> Manifest:
        return next(m for m in of_kind(self.among, "ConfigMap") if m["metadata"]["name"] == name)


def workloads(manifests: tuple[Manifest, ...]) -> list[Workload]:
    """Everything with pods of its own."""
    return [Workload(m, manifests) for m in of_kind(manifests, "Deployment", "StatefulSet", "Job")]


def selects(selector: Manifest, labels: Mapping[str, str]) -> bool:
    """Whether a label selector matches."""
    if any(labels.get(key) != value for key, value in selector.get("matchLabels", {}).items()):
        return False
    for expression in selector.get("matchExpressions", ()):
        assert expression["operator"] == "In", expression
        if labels.get(expression["key"]) not in expression["values"]:
            return False
    return True


def strings(value: Any) -> Iterator[str]:
    """Every string anywhere in a manifest."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, each in value.items():
            yield str(key)
            yield from strings(each)
    elif isinstance(value, list):
        for each in value:
            yield from strings(each)


def _expanded(text: str, environment: Mapping[str, str]) -> str:
    """As Kubernetes expands $(NAME): a variable that is not known stays as it is."""
    return re.sub(r"\$\(([A-Za-z_][A-Za-z0-9_]*)\)", lambda m: environment.get(m[1], m[0]), text)
