"""The Grafana dashboard, made of the table of metrics:

python cluster/grafana.py
"""

import json
from pathlib import Path

from async_opd.telemetry import metric_names
from async_opd.telemetry.metric_names import PREFIX
from async_opd.telemetry.metrics import ROLES, STATES

FILE = Path(__file__).with_name("grafana-dashboard.json")
UNITS = {"share": "percentunit", "tokens/s": "short", "s": "s"}  # others: short
PANELS = (  # title, keys; four in a row
    ("Accuracy of rollouts", ("accuracy",)),
    ("KL to the teacher", ("kl",)),
    ("Loss", ("loss", "loss_taught")),
    ("Time left", ("left_s",)),
    ("Speed", ("generators_tokens_per_s", "teachers_tokens_per_s", "trained_tokens_per_s")),
    ("Queue", ("queue_ready", "queue_outstanding", "queue_slots")),
    ("Lag", ("lag_mean", "lag_max", "kv_lag_mean")),
    ("Trained tokens by lag", ("tokens_lag_N",)),
    *((f"Time of {role}", tuple(f"{role}_{state}" for state in STATES)) for role in ROLES),
    ("Importance weights", ("weight_mean", "weight_max", "ratio_mean", "ratio_max")),
    ("Effective sample size", ("weight_ess", "ratio_ess")),
    (
        "Stale and fresh log-ratios",
        ("log_ratio_stale", "log_ratio_fresh_max", "parity_gap", "parity_mean"),
    ),
    ("Lost to training", ("dropped", "tokens_excluded", "verdicts_unknown")),
    ("Gradient", ("grad_norm",)),
    ("Learning rate", ("lr",)),
)
WIDTH, HEIGHT, COLUMNS = 6, 7, 4  # of a panel, and how many stand side by side: a row has 24


def dashboard() -> dict:
    """What Grafana imports; the user picks the Prometheus it reads, and the runs."""
    runs = f"label_values(ray_{PREFIX}step, run)"
    source = {"name": "source", "label": "Prometheus", "type": "datasource", "query": "prometheus"}
    run = {
        "name": "run",
        "label": "Run",
        "type": "query",
        "query": runs,
        "definition": runs,
        "datasource": SOURCE,
    }
    return {
        "uid": "async-opd",
        "title": "async-opd",
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [source, run | {"refresh": 2, "multi": True, "includeAll": True}]},
        "panels": [_panel(at, title, keys) for at, (title, keys) in enumerate(PANELS)],
    }


SOURCE = {"type": "prometheus", "uid": "${source}"}


def _panel(at: int, title: str, keys: tuple[str, ...]) -> dict:
    row, column = divmod(at, COLUMNS)
    shares = len(keys) == len(STATES)
    custom = {
        "fillOpacity": 60 if shares else 5,
        "stacking": {"mode": "normal" if shares else "none"},
    }
    unit = UNITS.get(_metric(keys[0]).unit, "short")
    bounds = {"min": 0, "max": 1} if shares else {}
    return {
        "id": at + 1,
        "title": title,
        "description": "\n".join(
            f"{key}: {_metric(key).meaning} ({_metric(key).unit or 'number'})" for key in keys
        ),
        "type": "timeseries",
        "datasource": SOURCE,
        "gridPos": {"x": column * WIDTH, "y": row * HEIGHT, "w": WIDTH, "h": HEIGHT},
        "fieldConfig": {"defaults": {"unit": unit, "custom": custom, **bounds}, "overrides": []},
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom"},
            "tooltip": {"mode": "multi"},
        },
        "targets": [_target(f"{chr(ord('A') + i)}", key) for i, key in enumerate(keys)],
    }


def _target(ref: str, key: str) -> dict:
    """One series a run; of a key with a number in it, one a number."""
    if key.endswith("_N"):
        name = f"ray_{PREFIX}{metric_names.pattern(key)}"
        found = f'{{__name__=~"{name}", run=~"$run"}}'
        return _read(
            ref,
            f'label_replace({found}, "n", "$1", "__name__", "{name}")',
            f"{{{{run}}}} {key[:-1]}{{{{n}}}}",
        )
    return _read(ref, f'ray_{PREFIX}{key}{{run=~"$run"}}', f"{{{{run}}}} {key}")


def _read(ref: str, expression: str, legend: str) -> dict:
    return {"refId": ref, "datasource": SOURCE, "expr": expression, "legendFormat": legend}


def _metric(key: str) -> metric_names.Metric:
    return metric_names.of(key.replace("_N", "_0"))


if __name__ == "__main__":
    FILE.write_text(json.dumps(dashboard(), indent=1) + "\n", encoding="utf-8")
