"""The dashboard file: what Grafana needs of it, and that it asks for nothing that is not there."""

import itertools
import json
import re
from pathlib import Path

import jsonschema
import pytest

from async_opd.telemetry import metric_names

SOURCE = {"const": {"type": "prometheus", "uid": "${source}"}}
TARGET = {
    "type": "object",
    "required": ["refId", "expr", "legendFormat", "datasource"],
    "properties": {
        "refId": {"pattern": "^[A-Z]$"},
        "expr": {"type": "string"},
        "datasource": SOURCE,
    },
}
PANEL = {
    "type": "object",
    "required": ["id", "type", "title", "gridPos", "targets", "datasource", "fieldConfig"],
    "properties": {
        "type": {"const": "timeseries"},
        "datasource": SOURCE,
        "gridPos": {
            "required": ["x", "y", "w", "h"],
            "additionalProperties": {"type": "integer", "minimum": 0},
        },
        "targets": {"type": "array", "minItems": 1, "items": TARGET},
    },
}
DASHBOARD = {
    "type": "object",
    "required": ["uid", "title", "schemaVersion", "templating", "panels", "time"],
    "properties": {
        "schemaVersion": {"minimum": 36},
        "panels": {"type": "array", "minItems": 10, "items": PANEL},
    },
}


@pytest.fixture
def dashboard() -> dict:
    return json.loads(Path("cluster/grafana-dashboard.json").read_text(encoding="utf-8"))


def test_it_has_what_grafana_needs(dashboard):
    jsonschema.validate(dashboard, DASHBOARD)
    panels = dashboard["panels"]
    assert [panel["id"] for panel in panels] == list(range(1, len(panels) + 1))
    for panel in panels:
        refs = [target["refId"] for target in panel["targets"]]
        assert len(refs) == len(set(refs))
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
    for one, other in itertools.combinations((panel["gridPos"] for panel in panels), 2):
        apart = [
            one[start] + one[size] <= other[start] or other[start] + other[size] <= one[start]
            for start, size in ("xw", "yh")
        ]
        assert any(apart)


def test_each_panel_asks_for_metrics_that_exist_and_says_what_they_mean(dashboard):
    """Where it does not: `python cluster/grafana.py` makes the file anew."""
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            (key,) = set(re.findall(r"ray_async_opd_(\w+(?:\(\[0-9\]\+\))?)", target["expr"]))
            metric = metric_names.of(key.replace("([0-9]+)", "7"))
            assert metric.meaning in panel["description"]
            assert 'run=~"$run"' in target["expr"]
            assert target["expr"].count("(") == target["expr"].count(")")
