"""Checks of the tables that are passed through to vLLM and DeepSpeed: names and types by what the
installed packages take, and what would break a guarantee by name."""

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import msgspec
from msgspec import Struct

from async_opd.config import deepspeed_keys as deepspeed
from async_opd.config import vllm_arguments as vllm
from async_opd.config.schema import Config
from async_opd.config.signatures import Place, struct_of
from async_opd.config.validate import refuse_unlike
from async_opd.core.errors import ConfigError
from async_opd.core.suggest import shown
from async_opd.roles.learner.config import LearnerConfig
from async_opd.roles.rollout.config import EngineConfig
from async_opd.roles.teacher.config import ScorerConfig

Reasons = dict[str, str]  # why a name may not be set, by the name
ENGINE = Place("vllm.engine.arg_utils", "AsyncEngineArgs")
BOUNDED_AS = [
    Place("vllm.config", f"{part}Config")
    for part in ("Model", "Cache", "Scheduler", "Parallel", "Load", "Observability")
]
# What vLLM declares as a table of anything, and makes this of.
SPECULATION = Place("vllm.config.speculative", "SpeculativeConfig")
ZERO = Place("deepspeed.runtime.zero.config", "DeepSpeedZeroConfig")


def check_tables(config: Config) -> None:
    """Refuse the tables of a run that its roles may not be given, or would not take. Raises
    ConfigError."""
    check_engine("rollout", config.rollout)
    sampled = {"teacher"} if config.teacher_sampling else set[str]()
    for section, scorer in config.scorers.items():
        if scorer.engine and scorer.backend != "vllm" and section not in sampled:
            raise ConfigError(
                f"{section}.engine = {shown(scorer.engine)}: has no effect with {section}.backend ="
                f" {scorer.backend!r}"
            )
        check_engine(section, scorer)
    check_deepspeed(config.learner)


def check_engine(section: str, config: EngineConfig | ScorerConfig) -> None:
    """Refuse the table [section.engine] where its role's engine may not be given it, or would not
    take it: the second where vLLM is installed. Raises ConfigError."""
    if not config.engine:
        return
    ours = isinstance(config, EngineConfig)
    reasons = by_name(vllm.NEVER, vllm.GENERATOR_NEVER if ours else vllm.TEACHER_NEVER)
    path = f"{section}.engine"
    _refuse_named(path, section, config.engine, reasons)
    for place, (value, reason) in vllm.NEVER_THIS.items():
        if _looked_up(config.engine, place) == value:
            raise ConfigError(f"{path}.{place} = {value!r}: may not be set: {reason}")
    takes = engine_takes()
    if takes is None:
        return
    refuse_unlike(config.engine, takes, path)
    may = f"{vllm.MAY} {vllm.GENERATOR_MAY if ours else vllm.TEACHER_MAY}".split()
    for name, value in config.engine.items():
        if name not in may:
            raise ConfigError(
                f"{path}.{name} = {shown(value)}: may not be set: it is new in the vLLM that is"
                " installed, and nobody has looked at what it does to a run"
            )
    tokens = config.engine.get("max_num_batched_tokens")
    if isinstance(config, EngineConfig) and tokens and tokens < config.concurrency:
        raise ConfigError(
            f"{path}.max_num_batched_tokens = {tokens}: must be >= {section}.concurrency ="
            f" {config.concurrency}, of which each takes one in a step"
        )


def check_deepspeed(config: LearnerConfig) -> None:
    """Refuse the table [learner.deepspeed] where it may not be given to DeepSpeed, or would not be
    taken. Raises ConfigError."""
    table = config.deepspeed
    if not table:
        return
    path = "learner.deepspeed"
    _refuse_named(path, "learner", table, by_name(deepspeed.NEVER))
    zero = table.get("zero_optimization")
    if isinstance(zero, dict):
        _refuse_named(f"{path}.zero_optimization", "learner", zero, by_name(deepspeed.ZERO_NEVER))
    refuse_unlike(table, deepspeed_takes(), path)
    if _looked_up(table, "zero_optimization.overlap_comm") and (config.zero_stage or 1) < 2:
        raise ConfigError(
            f"{path}.zero_optimization.overlap_comm = true: needs learner.zero_stage 2 or 3, which"
            " reduce gradients before the last micro-batch"
        )


@cache
def engine_takes() -> type[Struct] | None:
    """Read what vLLM's engine takes; None where vLLM is not installed."""
    takes = struct_of(ENGINE, BOUNDED_AS)
    speculation = struct_of(SPECULATION)
    if takes is None or speculation is None:
        return None
    fields = {f.name: f.type for f in msgspec.structs.fields(takes)}
    fields["speculative_config"] = speculation
    return _struct("engine", fields)


@cache
def deepspeed_takes() -> type[Struct]:
    """Read what DeepSpeed takes of a table."""
    zero = struct_of(ZERO) or dict[str, Any]
    return _struct("deepspeed", {"zero_optimization": zero, **deepspeed.MAY})


def by_name(*tables: Mapping[str, str]) -> Reasons:
    """Give the reason why for each name of tables that have the names for each reason."""
    return {
        name: reason
        for table in tables
        for reason, names in table.items()
        for name in names.split()
    }


def _struct(name: str, fields: Mapping[str, Any]) -> type[Struct]:
    optional: Iterable[tuple[str, Any, None]] = [(key, kind, None) for key, kind in fields.items()]
    return msgspec.defstruct(name, optional, kw_only=True, forbid_unknown_fields=True)


def _refuse_named(path: str, section: str, table: dict[str, Any], reasons: Reasons) -> None:
    for name, value in table.items():
        if name in reasons:
            model = "student.model" if section == "rollout" else f"{section}.model"
            reason = reasons[name].replace("{section}", section).replace("{model}", model)
            raise ConfigError(f"{path}.{name} = {shown(value)}: may not be set: {reason}")


def _looked_up(table: Any, place: str) -> Any:
    """Look up the value at `place` in tables in one another; None where there is none."""
    for name in place.split("."):
        table = table.get(name) if isinstance(table, dict) else None
    return table
