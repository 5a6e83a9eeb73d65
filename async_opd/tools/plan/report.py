"""The whole plan as one object, and in words."""

from collections.abc import Iterator

from msgspec import Struct

from async_opd.tools.plan.balance import Balance
from async_opd.tools.plan.make import Cluster, Problem, RolePlan

CALIBRATE = (
    "a run needs rates for this: `async-opd train CONFIG run.steps=20 run.dir=DIR`, then plan with"
    " `--like DIR`; or `--rates generator=…,teacher=…,learner=…`, tokens/s of one"
)


class Plan(Struct, frozen=True, kw_only=True):
    """The object that `--json` prints. Sizes are GiB."""

    config: str
    fits: bool
    cluster: Cluster
    nodes: dict[str, list[str]]  # members by node
    roles: list[RolePlan]
    groups_outstanding: int
    trajectories_outstanding: int
    worst_lag_steps: int
    sent_gib: float  # by an update, to each GPU of a generator
    longest_response: int  # tokens, that memory and contexts have room for
    longest_bound_by: list[str]
    balance: Balance | None
    problems: list[Problem]
    servers: dict[str, list[str]]  # asked by members that take no card, by section
    checked: list[str]
    skipped: list[str]


def lines(plan: Plan) -> list[str]:
    """Write the plan, line by line, for a reader."""
    c, count = plan.cluster, len(plan.nodes) or plan.cluster.nodes or "any number of"
    return [
        f"{plan.config} on {count} node(s) of {c.gpus_per_node} x {c.gpu_memory_gib:g} GiB",
        *(f"  {node:8} {_grouped(members)}" for node, members in plan.nodes.items()),
        "",
        "memory of one GPU of each role, GiB (estimates; of backward and update only the larger"
        " counts)",
        *(line for role in plan.roles for line in _role(role)),
        *(
            f"  {section:16} no GPU       asks {len(urls)} server(s): {', '.join(urls)}"
            for section, urls in plan.servers.items()
        ),
        "",
        f"outstanding      at most {plan.groups_outstanding} groups,"
        f" {plan.trajectories_outstanding} trajectories",
        f"worst lag        {plan.worst_lag_steps} optimizer steps",
        f"each update      {_bytes(plan.sent_gib)} to each GPU of a generator",
        f"longest response {plan.longest_response:,} tokens, bounded by"
        f" {' and '.join(plan.longest_bound_by)}",
        *_balance(plan.balance),
        *(line for problem in plan.problems for line in _problem(problem)),
        f"checked          {'; '.join(plan.checked)}",
        *([f"skipped          {'; '.join(plan.skipped)}"] if plan.skipped else []),
        "it fits" if plan.fits else "it does not fit",
    ]


def _role(role: RolePlan) -> Iterator[str]:
    """Yield what one GPU of a role holds."""
    cards, mark = f"{role.members} x {role.gpus:g} GPU", "" if role.fits else "   DOES NOT FIT"
    held = f"{role.total_gib:6.1f} of {role.limit_gib:.1f}"
    yield f"  {role.role:16} {cards:12} {held}{mark}   {_size(role.parameters)} {role.model}"
    yield "    " + ", ".join(
        f"{name.replace('_', ' ')} {size:.1f}" for name, size in role.parts_gib.items() if size
    )
    if role.kv_tokens is not None:
        yield (
            f"    cache for {role.kv_tokens:,} tokens: {role.kv_tokens // role.longest_tokens:,}"
            f" sequences of the longest, {role.longest_tokens:,},"
            f" {role.kv_tokens // role.typical_tokens:,} of a typical {role.typical_tokens:,}"
        )
    if role.host_gib >= 0.05:
        yield f"    on the host {role.host_gib:.1f}, of each"


def _balance(balance: Balance | None) -> list[str]:
    """Say what keeps up with what."""
    if balance is None:
        return [f"bottleneck       not known: {CALIBRATE}"]
    does = ", ".join(f"{role} {rate:,.0f}" for role, rate in balance.capacity.items())
    return [
        f"bottleneck       {balance.bottleneck} (tokens/s of all: {does}; {balance.source})",
        f"in balance       {balance.generators} generator(s) and {balance.teachers} teacher(s) keep"
        " up with the learner",
        *(f"  measured otherwise: {what}" for what in balance.differs),
    ]


def _problem(problem: Problem) -> list[str]:
    """Say what does not fit, and each change that lets it."""
    return [
        f"does not fit     {problem.what}",
        *(f"  {'or' if place else 'set'} {change}" for place, change in enumerate(problem.changes)),
    ]


def _grouped(members: list[str]) -> str:
    """Write members as "generator 0, 1; verifier 0"."""
    numbers_by_role: dict[str, list[str]] = {}
    for member in members:
        role, _, number = member.rpartition(" ")
        numbers_by_role.setdefault(role, []).append(number)
    return (
        "; ".join(f"{role} {', '.join(numbers)}" for role, numbers in numbers_by_role.items())
        or "nobody"
    )


def _bytes(gib: float) -> str:
    return f"{gib:.2f} GiB" if gib >= 0.1 else f"{1024 * gib:.2f} MiB"


def _size(parameters: int) -> str:
    return f"{parameters / 1e9:.1f}B" if parameters >= 1e9 else f"{parameters / 1e6:.1f}M"
