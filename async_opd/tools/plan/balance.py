"""Numbers of generators and teachers that keep up with the learner, from rates that are known or
measured in a short run."""

import json
import re
from collections.abc import Iterator
from math import ceil
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import msgspec
from msgspec import Struct

from async_opd.config.schema import Config
from async_opd.core.errors import ConfigError, RunMissing
from async_opd.core.foreign import foreign
from async_opd.core.reading import content_of
from async_opd.core.run_dir import CONFIG, METRICS, decode_row, read_lines

# its name in a row, that of its tokens, and the states in which it waits for no other role
ROLES = {
    "generator": ("generators", "generators", ("busy", "syncing")),
    "teacher": ("teachers", "teachers", ("busy", "syncing")),
    "learner": ("learner", "trained", ("busy", "syncing", "blocked")),  # blocked: by a checkpoint
}
SLOWER = {  # settings that rates hang on
    "model",
    "backend",
    "dtype",
    "tensor_parallel_size",
    "max_new_tokens",
    "concurrency",
    "gradient_checkpointing",
}
RATES = 1e-3, 1e12  # tokens a second that are believed
WARM = 3  # first steps of a run, which are slow


class Balance(Struct, frozen=True, kw_only=True):
    """Rates of each role, in response tokens a second of one generator, one teacher replica, one
    learner rank at work, and what follows from them."""

    source: str
    rates: dict[str, float]
    capacity: dict[str, float]  # of all members, as planned
    bottleneck: str
    generators: int  # that keep up with the learner
    teachers: int  # of all kinds
    differs: list[str]  # from the run that was measured


def balance(config: Config, rates: dict[str, float], source: str, differs: list[str]) -> Balance:
    """Balance a run: every token is sampled, scored and trained once, so the role that does the
    fewest a second bounds it; ranks are taken to add up."""
    capacity = {
        role: rates[role] * count
        for role, count in _counts(msgspec.to_builtins(config)).items()
        if count  # no teacher beside a learner that scores
    }
    return Balance(
        source=source,
        rates=rates,
        capacity=capacity,
        bottleneck=min(capacity, key=lambda role: capacity[role]),
        generators=ceil(capacity["learner"] / rates["generator"]),
        teachers=ceil(capacity["learner"] / rates["teacher"]) if "teacher" in capacity else 0,
        differs=differs,
    )


def parse_rates(text: str, config: Config) -> dict[str, float]:
    """Parse rates of the roles that `config` has, `generator=…,teacher=…,learner=…`. Raises
    ConfigError."""
    low, high = RATES
    roles = [role for role, count in _counts(msgspec.to_builtins(config)).items() if count]
    allowed = (
        f"--rates {text}: must be {','.join(f'{role}=TOKENS_PER_S' for role in roles)}, each from"
        f" {low:g} to {high:g}"
    )
    try:
        rates = {
            role: float(rate) for role, _, rate in (part.partition("=") for part in text.split(","))
        }
    except ValueError as e:
        raise ConfigError(allowed) from e
    if set(rates) != set(roles) or not all(low <= rate <= high for rate in rates.values()):
        raise ConfigError(allowed)
    return rates


class Measured(NamedTuple):
    """What a short run says of a longer one."""

    rates: dict[str, float]  # of members at work
    differs: list[str]  # settings that they hang on, and are otherwise now
    response: float | None  # mean tokens of one; None: the rows do not say


def measured(run_dir: Path, config: Config) -> Measured:
    """Measure a run whose settings may differ from `config`. Raises RunMissing where `run_dir`
    holds no rows."""
    needs = f"{run_dir}: --like needs a run's directory with config.json and metrics.jsonl"
    with foreign(needs, RunMissing):
        then = json.loads(content_of(run_dir / CONFIG))
        rows = [row for _, row in read_lines(run_dir / METRICS, decode_row)]
        # whose keys may be those of another version, or of somebody else
        return _measured(run_dir, then, rows, config)


def _measured(
    run_dir: Path, then: dict[str, Any], rows: list[dict[str, Any]], config: Config
) -> Measured:
    """Measure by the `rows` of the run whose config was `then`."""
    if len(rows) <= WARM:
        raise RunMissing(
            f"{run_dir}: --like needs more than {WARM} steps, the first are slow; it has"
            f" {len(rows)}"
        )
    counts = _counts(then)
    now = msgspec.to_builtins(config)
    roles = [role for role, count in _counts(now).items() if count]
    tokens = dict.fromkeys(roles, 0.0)
    seconds = dict.fromkeys(roles, 0.0)
    for before, row in zip(rows[WARM - 1 :], rows[WARM:], strict=False):
        passed = row["elapsed_s"] - before["elapsed_s"]
        if passed <= 0:  # the run was gone on with, and counts anew
            continue
        for role in (role for role in roles if counts[role]):
            name, counted, at_work = ROLES[role]
            tokens[role] += row[f"{counted}_tokens_per_s"] * passed
            share = sum(row[f"{name}_{state}"] for state in at_work)
            seconds[role] += share * passed * counts[role]
    idle = [role for role in roles if not tokens[role] or not seconds[role]]
    if idle:
        raise RunMissing(f"{run_dir}: its rows have no work of {', '.join(idle)}")
    lengths = [row["length_mean"] for row in rows if row.get("length_mean")]
    return Measured(
        rates={role: tokens[role] / seconds[role] for role in roles},
        differs=list(_differences(then, now)),
        response=fmean(lengths) if lengths else None,
    )


def _counts(tree: dict[str, Any]) -> dict[str, int]:
    """Count the members of each role by a config's tree; a teacher in the learner is none."""
    teachers = tree["teachers"].values() if tree["teacher"] is None else [tree["teacher"]]
    return {
        "generator": tree["rollout"]["generators"],
        # servers have their number from their addresses
        "teacher": sum(
            len(t.get("urls", ())) or t["replicas"] for t in teachers if t["backend"] != "learner"
        ),
        "learner": tree["learner"]["ranks"],
    }


def _differences(then: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """Say which settings that rates hang on differ between two configs."""
    for section in ("student", "teacher", "rollout", "learner"):
        before, after = then[section] or {}, now[section] or {}
        for key in sorted(before.keys() & after.keys() & SLOWER):
            ends = (
                re.split("[/:]", value)[-1] if key == "model" else value
                for value in (before[key], after[key])
            )
            if len(set(ends)) > 1:  # a model may lie elsewhere now
                yield f"{section}.{key}: {before[key]!r} then, {after[key]!r} now"
