"""Writes the rules as the Prometheus operator wants them, a PrometheusRule for each file: run it after a change of one.

kustomize makes ConfigMaps of files, and nothing else.
"""

import sys
from pathlib import Path

_HERE = Path(__file__).resolve().parent
_HEAD = """\
# Made by generate_kubernetes.py from prometheus/{file}: change that.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: memshard-{name}
spec:
"""


def manifests() -> dict[str, str]:
    """What is to be in each file of kubernetes/, by its name."""
    found = {}
    for file in sorted((_HERE / "prometheus").glob("rules-*.yml")):
        lines = file.read_text(encoding="utf-8").splitlines()
        body = "".join(f"  {line}\n" if line else "\n" for line in lines)
        found[f"{file.stem}.yaml"] = _HEAD.format(file=file.name, name=file.stem.removeprefix("rules-")) + body
    return found


def write(folder: Path) -> None:
    """Writes them."""
    folder.mkdir(exist_ok=True)
    for name, text in manifests().items():
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else _HERE / "kubernetes")
