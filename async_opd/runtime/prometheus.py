"""Gauges that the cluster's nodes export to Prometheus."""

from collections.abc import Callable

import ray.util.metrics


def gauge(name: str, meaning: str, run: str) -> Callable[[float], None]:
    """Make a gauge, which the agent of this node exports to Prometheus as `ray_<name>` with the
    label `run`; return what sets it."""
    made = ray.util.metrics.Gauge(name, description=meaning, tag_keys=("run",))
    made.set_default_tags({"run": run})
    # ray types the tags, which are None unless given, as never None
    return made.set  # pyright: ignore[reportReturnType]
