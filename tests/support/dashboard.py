"""The chart's Grafana dashboard, and the metrics that it asks Prometheus for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from tests.support.rendered_chart import of_kind


def dashboard(documents: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the dashboard of a rendered chart."""
    (config,) = [
        one
        for one in of_kind(documents, "ConfigMap")
        if one["metadata"]["labels"]["app.kubernetes.io/component"] == "dashboard"
    ]
    (text,) = config["data"].values()
    return dict(json.loads(text))


def expressions(board: dict[str, Any]) -> Iterator[str]:
    """Yield every query, its variables not filled in."""
    for panel in board["panels"]:
        for target in panel.get("targets", ()):
            yield target["expr"]


def selected(board: dict[str, Any]) -> dict[str, set[str]]:
    """Return the labels by which each metric is selected, by the metric's name."""
    found: dict[str, set[str]] = {}
    for expression in expressions(board):
        for name, matchers in re.findall(r'(\w+)\{((?:[^}"]|"[^"]*")*)\}', expression):
            found.setdefault(name, set()).update(re.findall(r'(\w+)(?:=~|!=|!~|=)"', matchers))
    return found


def unserved(board: dict[str, Any], served: str) -> list[str]:
    """Return the metrics of MLflow that no line of its /metrics has, with the labels asked for."""
    added = {"namespace", "service"}  # by Prometheus
    return [
        f"{name} by {labels - added}"
        for name, labels in selected(board).items()
        if name.startswith("mlflow_")
        and not any(
            line.startswith(f"{name}{{") and all(f'{one}="' in line for one in labels - added)
            for line in served.splitlines()
        )
    ]
