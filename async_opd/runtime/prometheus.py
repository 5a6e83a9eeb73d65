"""Gauges that the cluster's nodes export to Prometheus."""

import ray.util.metrics


def gauge(name: str, meaning: str, run: str) -> ray.util.metrics.Gauge:
    """Make a gauge to `set` what the agent of this node exports to Prometheus as `ray_<name>` with
    the label `run`."""
    made = ray.util.metrics.Gauge(name, description=meaning, tag_keys=("run",))
    made.set_default_tags({"run": run})
    return made
