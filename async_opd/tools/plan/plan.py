"""A plan, from a config to what fits and what helps."""

from pathlib import Path
from typing import Any

import msgspec

from async_opd.config.load import load
from async_opd.config.precision import refuse_on_gpus, with_dtypes
from async_opd.config.schema import Config
from async_opd.core.errors import ClusterTooSmall, ConfigError
from async_opd.maths.lag import slots
from async_opd.runtime.placement import resource_requests
from async_opd.tools.plan import advise, balance, make, memory, shape
from async_opd.tools.plan.longest import longest_response
from async_opd.tools.plan.report import Plan

ONLINE = ["config", "model files", "vocabularies", "rows of data (of a hub's set the first)"]


def plan(
    path: Path,
    overrides: list[str],
    cluster: make.Cluster,
    rates: str | None,
    like: Path | None,
    *,
    offline: bool,
) -> Plan:
    """Plan the run of the config at `path` with `overrides` on `cluster`, balanced by `rates`, or
    by those of the run `like`, whose responses are the typical ones. Raises ConfigError, DataError,
    RunMissing."""
    config, gpus_per_node = with_dtypes(load(path, overrides), gpus=True), cluster.gpus_per_node
    _refuse_absurd(msgspec.to_builtins(config), "")
    then = balance.measured(like, config) if like else None
    response = then and then.response
    shapes, card = _shapes(config, offline), cluster.gpu_memory_gib * make.GIB
    _refuse_on_gpus(config, shapes)

    def retry(more: list[str]) -> set[str] | None:
        try:
            changed = with_dtypes(load(path, [*overrides, *more]), gpus=True)
            _refuse_on_gpus(changed, shapes)
        except ConfigError:
            return None
        requests = tuple(resource_requests(changed, gpus=True))
        if not make.has_places(requests, gpus_per_node, cluster.nodes):
            return None
        needed = make.needs(changed, shapes, card, response)
        return {need.request.role for need in needed if not need.fits}

    needs = make.needs(config, shapes, card, response)
    problems = list(advise.problems(config, needs, retry, gpus_per_node))
    try:
        nodes = make.places(config, gpus_per_node, cluster.nodes)
    except ClusterTooSmall as e:
        nodes = {}
        problems.insert(0, make.Problem(what=f"{e}", changes=_more_nodes(config, gpus_per_node)))
    longest, bound_by = longest_response(config, shapes, card)
    groups = slots(config.outstanding_steps, config.groups_per_step)
    return Plan(
        config=str(path),
        fits=not problems,
        cluster=cluster,
        nodes=nodes,
        roles=[need.plan() for need in needs],
        groups_outstanding=groups,
        trajectories_outstanding=groups * config.rollout.samples_per_prompt,
        worst_lag_steps=config.run.max_lag_steps,
        sent_gib=_sent(config, shapes) / make.GIB,
        longest_response=longest,
        longest_bound_by=bound_by,
        balance=_balance(config, rates, then, like),
        problems=problems,
        servers={section: [*map(str, s.members)] for section, s in config.served.items()},
        checked=ONLINE[:1] if offline else ONLINE,
        skipped=ONLINE[1:] if offline else [],
    )


def _refuse_on_gpus(config: Config, shapes: dict[str, shape.Shape]) -> None:
    """Raise ConfigError for what a run would refuse once it is on GPUs."""
    on_transformers = {name: shapes[model] for name, model in config.on_transformers.items()}
    refuse_on_gpus(
        config, {name: (each.heads, each.kv_heads) for name, each in on_transformers.items()}
    )


def _sent(config: Config, shapes: dict[str, shape.Shape]) -> float:
    """Count the bytes that an update carries to each GPU of a generator."""
    student, b = shapes[config.student.model], memory.element(config.learner.dtype)
    return memory.sent(student, b, config.sync, make.trained_beside(config, student))


def _refuse_absurd(settings: dict[str, Any], section: str) -> None:
    """Raise ConfigError for a number beyond shape.MOST, which is a slip, and no memory."""
    for name, value in settings.items():
        if isinstance(value, dict):
            _refuse_absurd(value, f"{section}{name}.")
        elif isinstance(value, int | float) and value > shape.MOST:
            raise ConfigError(f"{section}{name} = {value}: plan counts up to {shape.MOST:g}")


def _more_nodes(config: Config, gpus_per_node: int) -> list[str]:
    """Name the option for as many nodes as are needed; none where a member is larger than a
    node."""
    try:
        return [f"--nodes {len(make.places(config, gpus_per_node, None))}"]
    except ClusterTooSmall:
        return []


def _shapes(config: Config, offline: bool) -> dict[str, shape.Shape]:
    """Read the shape of each model by the model's name; and check the data, unless `offline`."""
    if offline:
        return shape.of_all(
            make.models(config),
            config.served,
            lambda key, model: shape.local(key, model) or shape.shipped(key, model),
        )
    from async_opd.tools.plan import checks

    shapes = checks.shapes(config)
    checks.rows(config)
    return shapes


def _balance(
    config: Config, rates: str | None, then: balance.Measured | None, like: Path | None
) -> balance.Balance | None:
    if rates:
        return balance.balance(config, balance.parse_rates(rates, config), "rates as given", [])
    if then:
        return balance.balance(config, then.rates, f"rates of {like}", then.differs)
    return None
