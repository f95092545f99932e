"""The metrics that queries name: of rules, of a dashboard's panels."""

import json
import re
from pathlib import Path
from typing import Any

import yaml

MONITORING = Path(__file__).parents[2] / "deploy" / "monitoring"
RULES = sorted((MONITORING / "prometheus").glob("rules-*.yml"))
DASHBOARDS = sorted((MONITORING / "grafana" / "dashboards").glob("*.json"))

_STRINGS = re.compile(r'"(?:[^"\\]|\\.)*"')
_SELECTORS = re.compile(r"\{[^{}]*\}|\[[^\[\]]*\]")
_GROUPINGS = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^()]*\)")
_NAMES = re.compile(r"(?<![\w:.$])([a-zA-Z_:][\w:]*)(?!\s*[(\w:])")
_WORDS = {"and", "or", "unless", "bool", "inf", "nan", "offset"}


def metrics_in(query: str) -> set[str]:
    """The names of the metrics in a query."""
    for what in (_STRINGS, _SELECTORS, _GROUPINGS):
        query = what.sub(" ", query)
    return {name for name in _NAMES.findall(query) if name.lower() not in _WORDS}


def rules() -> list[dict[str, Any]]:
    """All rules."""
    return [rule for file in RULES for group in yaml.safe_load(file.read_text())["groups"] for rule in group["rules"]]


def panels() -> list[tuple[str, str]]:
    """Title and query of everything that a dashboard shows."""
    documents = [json.loads(file.read_text()) for file in DASHBOARDS]
    return [
        (panel["title"], target["expr"])
        for document in documents
        for panel in document["panels"]
        for target in panel.get("targets", [])
    ]
