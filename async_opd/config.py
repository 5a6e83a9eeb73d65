"""The whole run in one typed TOML file: roles composed, cross-field rules, `load()` with overrides."""

import difflib
import re
import tomllib
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from async_opd.errors import ConfigError
from async_opd.learner.config import LearnerConfig
from async_opd.objectives import all_objectives
from async_opd.rollout.config import DataConfig, RolloutConfig
from async_opd.teacher.config import TeacherConfig
from async_opd.verify.checks import kinds
from async_opd.verify.config import VerifyConfig


class RunConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is run, how stale it may become, and where its files go."""

    dir: str  # run directory; made new
    steps: Annotated[int, Meta(ge=1)]  # optimizer steps
    seed: int = 0
    max_lag_steps: Annotated[int, Meta(ge=0)] = 4  # 0: strictly synchronous, 1: one step off, more: asynchronous
    stale: Literal["mask", "drop"] = "mask"  # over-age tokens leave the loss, or their group is issued anew
    max_attempts: Annotated[int, Meta(ge=1)] = 3  # of one prompt, before its final drop
    checkpoint_every_steps: Annotated[int, Meta(ge=1)] | None = None  # absent: only at the end
    trust_remote_code: bool = False
    wandb_project: str | None = None  # absent: jsonl only


class StudentConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The model that is distilled into."""

    model: str  # local directory or hub id of a causal LM


class SyncConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How weights travel from the learner to the generators, after every step."""

    backend: Literal["gloo", "nccl"] = "gloo"  # by way of host memory, or GPU to GPU
    bucket_mib: Annotated[int, Meta(ge=1)] = 256
    timeout_s: Annotated[float, Meta(gt=0)] = 20.0  # of one update
    parity_every_steps: Annotated[int, Meta(ge=1)] = 10  # probes: generator against learner
    parity_tolerance: Annotated[float, Meta(gt=0)] = 1e-3  # nats; bfloat16 needs about 0.2


class EvalConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Greedy accuracy on held-out rows, before and after."""

    path: str  # as data.path, with the same columns
    split: str = "train"
    problems: Annotated[int, Meta(ge=1)] = 256


class TimeoutConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Bounds of every wait, in seconds."""

    start_s: Annotated[float, Meta(gt=0)] = 300.0  # an actor with its model
    generate_s: Annotated[float, Meta(gt=0)] = 600.0  # one group
    score_s: Annotated[float, Meta(gt=0)] = 120.0  # one group by the teacher
    step_s: Annotated[float, Meta(gt=0)] = 600.0  # one optimizer step, or one checkpoint
    health_s: Annotated[float, Meta(gt=0)] = 2.0  # between two looks at an engine


class Config(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A run. `objective` is one of the tagged types in `async_opd.objectives`."""

    run: RunConfig
    student: StudentConfig
    teacher: TeacherConfig
    data: DataConfig
    rollout: RolloutConfig
    learner: LearnerConfig
    objective: reduce(or_, all_objectives().values())
    verify: VerifyConfig = msgspec.field(default_factory=VerifyConfig)
    sync: SyncConfig = msgspec.field(default_factory=SyncConfig)
    timeout: TimeoutConfig = msgspec.field(default_factory=TimeoutConfig)
    eval: EvalConfig | None = None

    @property
    def groups_per_step(self) -> int:
        """Prompts a step."""
        return self.learner.trajectories_per_step // self.rollout.samples_per_prompt


def load(path: str | Path, overrides: list[str] = ()) -> Config:
    """Read a TOML file, apply `key.path=value` overrides (values in TOML; a bare word is a string), check everything.

    Raises ConfigError naming the key's path, the value, what is allowed and the nearest spelling.
    """
    try:
        tree = tomllib.loads(Path(path).read_text())
    except OSError as e:
        raise ConfigError(f"config {path}: {e.strerror}") from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise ConfigError(f"config {path} is not valid TOML: {e}") from e
    for override in overrides:
        _override(tree, override)
    _check_keys(tree, Config, "")
    try:
        config = msgspec.convert(tree, Config)
    except msgspec.ValidationError as e:
        raise ConfigError(_explain(str(e), tree)) from e
    _check_across(config)
    return config


def _override(tree: dict, override: str) -> None:
    key, found, text = override.partition("=")
    if not found or not key:
        raise ConfigError(f"override {override!r}: write key.path=value, such as learner.lr=1e-4")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *parents, leaf = key.split(".")
    for name in parents:
        tree = tree.setdefault(name, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"override {override!r}: {name} is a value, not a section")
    tree[leaf] = value


def _check_keys(tree: Any, kind: type, path: str) -> None:
    """Unknown and missing keys, before types: their errors can name the nearest spelling."""
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a section [{path}], got {tree!r}")
    fields = {f.encode_name: f for f in msgspec.structs.fields(kind)}
    for name in tree:
        if name not in fields and name != kind.__struct_config__.tag_field:
            raise ConfigError(f"{_at(path, name)}: no such setting{_nearest(name, fields)}")
    for name, field in fields.items():
        if name not in tree and field.required:
            raise ConfigError(f"{_at(path, name)}: missing")
        if name == "objective":
            _check_keys(tree[name], _objective(tree[name]), name)
        elif name in tree and (section := _section(field.type)):
            _check_keys(tree[name], section, _at(path, name))


def _objective(tree: Any) -> type:
    known = all_objectives()
    tag = tree.get("tag") if isinstance(tree, dict) else tree
    if tag not in known:
        raise ConfigError(f"objective.tag: {tag!r}{_nearest(str(tag), known)}")
    return known[tag]


def _section(kind: Any) -> type | None:
    types = getattr(kind, "__args__", (kind,))
    return next((t for t in types if isinstance(t, type) and issubclass(t, Struct)), None)


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; allowed: {', '.join(sorted(known))}"


def _explain(message: str, tree: dict) -> str:
    """msgspec says "Expected …, got … - at `$.a.b`": put the key first, and the value beside it."""
    what, _, where = message.partition(" - at `$.")
    path = where.rstrip("`")
    value: Any = tree
    for name in re.findall(r"[^.\[\]]+", path):
        value = value[int(name)] if isinstance(value, list) else value.get(name)
    if what.startswith("Invalid enum value"):
        what = "not allowed"
    return f"{path} = {value!r}: {what}"


def _at(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _check_across(c: Config) -> None:
    """Rules that span fields. Each names both sides."""
    per_step, samples = c.learner.trajectories_per_step, c.rollout.samples_per_prompt
    longest = c.data.max_prompt_tokens + c.rollout.max_new_tokens
    rules = [
        (per_step % samples == 0, f"learner.trajectories_per_step = {per_step}: not a multiple of rollout.samples_per_prompt = {samples}"),
        (c.learner.ranks <= per_step, f"learner.ranks = {c.learner.ranks}: more than learner.trajectories_per_step = {per_step}"),
        (c.learner.micro_batch_tokens >= longest, f"learner.micro_batch_tokens = {c.learner.micro_batch_tokens}: less than data.max_prompt_tokens + rollout.max_new_tokens = {longest}"),
        (c.teacher.batch_tokens >= longest, f"teacher.batch_tokens = {c.teacher.batch_tokens}: less than data.max_prompt_tokens + rollout.max_new_tokens = {longest}"),
        (c.learner.warmup_steps < c.run.steps, f"learner.warmup_steps = {c.learner.warmup_steps}: not below run.steps = {c.run.steps}"),
        (c.learner.dtype == "float32" or c.learner.zero_stage > 0, "learner.dtype = 'bfloat16': needs learner.zero_stage 1 or 2, whose optimizer keeps float32 weights"),
        (c.data.epochs is None or not c.data.streaming or c.data.epochs == 1 or c.data.shuffle_buffer > 0, ""),
        (not c.data.template_args or c.data.chat_template, "data.template_args: have no effect without data.chat_template = true"),
        (not c.teacher.template_args or c.data.chat_template, "teacher.template_args: have no effect without data.chat_template = true"),
        (not c.teacher.evaluate or c.eval is not None, "teacher.evaluate = true: needs an [eval] section"),
    ]  # fmt: skip
    for holds, message in rules:
        if not holds:
            raise ConfigError(message)
    if c.verify.check not in kinds():
        raise ConfigError(f"verify.check = {c.verify.check!r}{_nearest(c.verify.check, kinds())}")
    for key, path in (("student.model", c.student.model), ("teacher.model", c.teacher.model)):
        _check_model(key, path)
    for key, path in (("data.path", c.data.path), *([("eval.path", c.eval.path)] if c.eval else [])):
        if Path(path).suffix and not Path(path).exists() and not path.startswith("toy:"):
            raise ConfigError(f"{key} = {path!r}: no such file")


def _check_model(key: str, path: str) -> None:
    if path in ("toy:student", "toy:teacher") or (re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not Path(path).exists()):
        return  # shipped, or a hub id
    if not Path(path).is_dir():
        raise ConfigError(f"{key} = {path!r}: no such directory, and not a hub id such as 'Qwen/Qwen3-0.6B'")
    if not (Path(path) / "config.json").exists():
        raise ConfigError(f"{key} = {path!r}: holds no config.json, so it is not a model directory")
