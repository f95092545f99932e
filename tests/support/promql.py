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
_SELECTOR = re.compile(r'(?<![\w:.$"])([a-zA-Z_:][\w:]*)(?:\{(?:[^{}"]|"(?:[^"\\]|\\.)*")*\})?')
_KEPT = re.compile(r"\b(?:by|on)\s*\(([^()]*)\)")
_WORDS = {"and", "or", "unless", "bool", "inf", "nan", "offset"}


def metrics_in(query: str) -> set[str]:
    """The names of the metrics in a query."""
    for what in (_STRINGS, _SELECTORS, _GROUPINGS):
        query = what.sub(" ", query)
    return {name for name in _NAMES.findall(query) if name.lower() not in _WORDS}


def selectors_in(query: str) -> list[str]:
    """What a query picks series with, labels and all, without the ranges."""
    names = metrics_in(query)
    return [found.group() for found in _SELECTOR.finditer(_GROUPINGS.sub(" ", query)) if found.group(1) in names]


def labels_in(query: str) -> set[str]:
    """The labels that a query groups or joins by."""
    return {label.strip() for group in _KEPT.findall(query) for label in group.split(",") if label.strip()}


def rules() -> list[dict[str, Any]]:
    """All rules."""
    return [rule for file in RULES for group in yaml.safe_load(file.read_text())["groups"] for rule in group["rules"]]


def targets() -> list[tuple[str, dict[str, Any]]]:
    """Everything that a dashboard asks for, with its panel's title."""
    documents = [json.loads(file.read_text()) for file in DASHBOARDS]
    return [
        (panel["title"], target)
        for document in documents
        for panel in document["panels"]
        for target in panel.get("targets", [])
    ]


def panels() -> list[tuple[str, str]]:
    """Title and query of everything that a dashboard shows."""
    return [(title, target["expr"]) for title, target in targets()]
