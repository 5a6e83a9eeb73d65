"""The whole run in one typed TOML file: roles composed, cross-field rules, `load()` with
overrides."""

import json
import re
import tomllib
from collections.abc import Iterator
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from async_opd.config.paths import MODELS, check_data, check_model, local
from async_opd.config.sections import (
    EvalConfig,
    RunConfig,
    StudentConfig,
    SyncConfig,
    TimeoutConfig,
)
from async_opd.config.teacher_rules import (
    Engines,
    backend_rules,
    form_rules,
    longest_sequence,
    sampling_rules,
    section,
    sharing_rules,
    tag,
    teacher_rules,
)
from async_opd.config.validate import refuse_mistakes
from async_opd.core.errors import ConfigError, RunMissing
from async_opd.core.suggest import beside, wrong
from async_opd.objectives import Objective, all_objectives
from async_opd.roles.learner.config import LearnerConfig
from async_opd.roles.rollout.config import DataConfig, RolloutConfig
from async_opd.roles.teacher.config import (
    ReferenceConfig,
    ScorerConfig,
    TeacherConfig,
    TeacherSamplingConfig,
)
from async_opd.roles.verifier.checks import kinds, known
from async_opd.roles.verifier.config import VerifyConfig

AnyObjective = reduce(or_, all_objectives().values())


class Config(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A run. `objective` is one of the tagged types in `async_opd.objectives`."""

    run: RunConfig
    student: StudentConfig
    data: DataConfig
    rollout: RolloutConfig
    learner: LearnerConfig
    objective: AnyObjective
    teacher: TeacherConfig | None = None  # one, or several of which each row names its own
    teachers: dict[str, TeacherConfig] = {}
    # absent: the student before its first step, where the objective needs one
    reference: ReferenceConfig | None = None
    verify: VerifyConfig = msgspec.field(default_factory=VerifyConfig)
    sync: SyncConfig = msgspec.field(default_factory=SyncConfig)
    timeout: TimeoutConfig = msgspec.field(default_factory=TimeoutConfig)
    eval: EvalConfig | None = None
    teacher_sampling: TeacherSamplingConfig | None = None

    @property
    def groups_per_step(self) -> int:
        """Prompts a step."""
        return self.learner.trajectories_per_step // self.rollout.samples_per_prompt

    @property
    def outstanding_steps(self) -> float:
        """Steps' worth of groups that may be outstanding."""
        return self.run.max_outstanding_steps or self.run.max_lag_steps + 1

    @property
    def named_teachers(self) -> dict[str, TeacherConfig]:
        """Every teacher by the name a prompt has for it; one alone has the name ""."""
        return self.teachers if self.teacher is None else {"": self.teacher}

    @property
    def inputs(self) -> dict[str, str]:
        """Models and data it reads, by the keys that name them."""
        found = {"student.model": self.student.model, "data.path": self.data.path}
        found |= {f"{at}.model": scorer.model for at, scorer in self.scorers.items()}
        return found | ({"eval.path": self.eval.path} if self.eval else {})

    @property
    def relative_inputs(self) -> dict[str, str]:
        """Of these what is here by a relative path; the rest is made by the run, of a hub, or
        another machine's."""
        return {
            key: name
            for key, name in self.inputs.items()
            if not Path(name).is_absolute() and Path(name).exists()
        }

    @property
    def scorers(self) -> dict[str, ScorerConfig]:
        """What scores rollouts, each with a `model`, by its section; the reference only where it is
        needed."""
        found: dict[str, ScorerConfig] = {
            section(name): teacher for name, teacher in self.named_teachers.items()
        }
        if self.objective.needs().reference:
            reference = self.reference or ReferenceConfig()
            found["reference"] = msgspec.structs.replace(
                reference, model=reference.model or self.student.model
            )
        return found

    @property
    def engines(self) -> list[Engines]:
        """Every pool of what holds a model, the learner apart."""
        found = [
            Engines(
                "generator", "rollout", self.rollout.generators, "rollout.generators", self.rollout
            )
        ]
        found += [
            Engines(at, at, each.replicas, f"{at}.replicas", each)
            for at, each in self.scorers.items()
        ]
        if sampling := self.teacher_sampling:
            setting = "teacher_sampling.generators"
            found.append(
                Engines("teacher-generator", "teacher", sampling.generators, setting, self.teacher)
            )
        return found


def load(path: str | Path, overrides: list[str] = (), *, elsewhere: bool = False) -> Config:
    """Read a TOML file, apply `key.path=value` overrides (values in TOML; a bare word is a string),
    check everything.

    `elsewhere`, for a run on other machines, takes an absolute path that is not here for one of
    theirs. Raises ConfigError naming the key's path, the value, what is allowed and the nearest
    spelling.
    """
    try:
        tree = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise ConfigError(f"config {path}: no such file{beside(path)}") from e
    except OSError as e:
        raise ConfigError(f"config {path}: {e.strerror}") from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise ConfigError(f"config {path} is not valid TOML: {e}") from e
    return _complete(tree, overrides, new=True, elsewhere=elsewhere)


def load_run(run_dir: Path, overrides: list[str] = (), *, elsewhere: bool = False) -> Config:
    """The config of the run in `run_dir`, to go on with, as `load` has it. Raises ConfigError or
    RunMissing."""
    tree = _written(read_run(run_dir, dict))
    return _complete(
        tree, [*overrides, f"run.dir={json.dumps(str(run_dir))}"], new=False, elsewhere=elsewhere
    )


def read_run(run_dir: Path, kind: type = Config) -> Any:
    """The config of the run in `run_dir` as it was, whatever has become of the files it names.
    Raises RunMissing."""
    try:
        return msgspec.json.decode((run_dir / "config.json").read_bytes(), type=kind)
    except OSError as e:
        raise RunMissing(f"{run_dir}: no config.json in it: {e.strerror}") from e
    except msgspec.DecodeError as e:
        raise RunMissing(f"{run_dir}: its config.json is damaged: {e}") from e


def _written(tree: Any) -> Any:
    """What a TOML file would say: it has no null, and what is absent is None here."""
    if not isinstance(tree, dict):
        return tree
    return {key: _written(value) for key, value in tree.items() if value is not None}


def _complete(tree: dict, overrides: list[str], new: bool, elsewhere: bool = False) -> Config:
    for override in overrides:
        apply_override(tree, override)
    config = checked(tree, Config)
    for broken, message in _rules(config):
        if broken:
            raise ConfigError(message)
    _check_files(config, elsewhere)
    check_run_dir(config, new)
    return config


class ObjectiveAlone(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An objective outside a run."""

    objective: AnyObjective


def load_objective(tag: str, overrides: list[str] = ()) -> Objective:
    """The objective of that tag by `key=value` settings of its section, checked as in a config."""
    tree = {"tag": tag}
    for override in overrides:
        apply_override(tree, override)
    return checked({"objective": tree}, ObjectiveAlone).objective


def checked(tree: dict, kind: type[Struct]) -> Any:
    """A struct of `kind` from a tree of settings. Raises ConfigError."""
    refuse_mistakes(tree, kind)
    try:
        return msgspec.convert(tree, kind)
    except msgspec.ValidationError as e:
        # an invariant of a section's own, whose message begins with the key
        place = re.fullmatch(r"(.*) - at `\$\.(.*)`", str(e))
        raise ConfigError(f"{place[2]}.{place[1]}" if place else str(e)) from e


def apply_override(tree: dict, override: str) -> None:
    """Put the setting that `key.path=value` names into the tree. Raises ConfigError."""
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


def _rules(c: Config) -> Iterator[tuple[bool, str]]:
    """Rules that span fields: whether each is broken, and a message that names both sides."""
    samples, learner = c.rollout.samples_per_prompt, c.learner
    per_step = f"learner.trajectories_per_step = {learner.trajectories_per_step}"
    longest = c.data.max_prompt_tokens + c.rollout.max_new_tokens
    broken = c.objective.needs().groups and samples < 2
    yield (
        broken,
        (
            f"rollout.samples_per_prompt = {samples}: must be >= 2 for {tag(c.objective)}, which"
            " compares them"
        ),
    )
    broken = bool(c.objective.needs().running) and c.rollout.truncated == "drop"
    limit = (
        f"must be 'train' or 'mask' for {tag(c.objective)}, whose running mean would leave out what"
        " is dropped"
    )
    yield broken, f"rollout.truncated = 'drop': {limit}"
    yield from form_rules(c.teacher, c.teachers, c.data)
    broken = learner.trajectories_per_step % samples != 0
    yield broken, f"{per_step}: must be a multiple of rollout.samples_per_prompt = {samples}"
    broken = learner.ranks > learner.trajectories_per_step
    yield (
        broken,
        f"learner.ranks = {learner.ranks}: must be <= {per_step}, or a rank has nothing to train",
    )
    least = f"must be >= data.max_prompt_tokens + rollout.max_new_tokens = {longest}"
    yield (
        learner.micro_batch_tokens < longest,
        f"learner.micro_batch_tokens = {learner.micro_batch_tokens}: {least}",
    )
    teachers = {section(name): teacher for name, teacher in c.named_teachers.items()}
    yield from teacher_rules(teachers, c.data, c.student.model, evaluated=c.eval is not None)
    yield from backend_rules(c.scorers, c.data, c.rollout, c.objective)
    broken = c.reference is not None and not c.objective.needs().reference
    yield broken, f"reference: has no effect with {tag(c.objective)}, which needs none"
    if c.teacher_sampling:
        yield from sampling_rules(c.teacher_sampling, c.teacher, c.rollout)
    if c.run.share_gpu:
        yield from sharing_rules(c.engines, learner.ranks, c.sync.backend)
    most, bound = c.run.max_lag_steps + 1, f"run.max_lag_steps + 1 = {c.run.max_lag_steps + 1}"
    broken = c.outstanding_steps > most
    yield (
        broken,
        (
            f"run.max_outstanding_steps = {c.outstanding_steps:g}: must be <= {bound}, or tokens go"
            " over age"
        ),
    )
    broken = learner.warmup_steps >= c.run.steps
    yield (
        broken,
        f"learner.warmup_steps = {learner.warmup_steps}: must be < run.steps = {c.run.steps}",
    )
    broken = learner.dtype == "bfloat16" and learner.zero_stage == 0
    stages = "needs learner.zero_stage 1, 2 or 3"
    yield broken, f"learner.dtype = 'bfloat16': {stages}, which keep float32 weights to update"
    broken = learner.offload_optimizer and learner.zero_stage == 0
    yield broken, f"learner.offload_optimizer = true: {stages}"
    dtypes, tolerance = (learner.dtype, c.rollout.dtype), c.sync.parity_tolerance
    broken = "bfloat16" in dtypes and tolerance < 0.01
    yield (
        broken,
        f"sync.parity_tolerance = {tolerance}: learner and rollout dtypes {dtypes} need about 0.2",
    )
    broken = c.verify.timeout_s >= c.timeout.score_s
    limit = f"must be < timeout.score_s = {c.timeout.score_s}, or one check that hangs ends the run"
    yield broken, f"verify.timeout_s = {c.verify.timeout_s}: {limit}"
    broken = c.timeout.stall_s <= c.sync.timeout_s
    limit = (
        f"must be > sync.timeout_s = {c.sync.timeout_s}, for which an engine that takes weights is"
        " silent"
    )
    yield broken, f"timeout.stall_s = {c.timeout.stall_s}: {limit}"
    forms = wrong("verify.check", c.verify.check, [*kinds(), "package.module:function"])
    yield not known(c.verify.check), forms


def _check_files(c: Config, elsewhere: bool) -> None:
    """What is named as local is there: models with a context for the longest sequence, data in a
    known format."""
    student = (
        "data.max_prompt_tokens + rollout.max_new_tokens",
        c.data.max_prompt_tokens + c.rollout.max_new_tokens,
    )
    models = [("student", c.student.model, *student, False)]
    for at, s in c.scorers.items():
        models.append(
            (at, s.model, *longest_sequence(at, s, c.data, c.rollout), s.backend == "vllm")
        )
    for at, model, bound, tokens, vllm in models:
        if folder := local(f"{at}.model", model, MODELS, elsewhere):
            check_model(at, model, folder, f"{bound} = {tokens}", tokens, vllm)
    for key, path in (
        ("data.path", c.data.path),
        *([("eval.path", c.eval.path)] if c.eval else []),
    ):
        check_data(key, path, elsewhere)


def check_run_dir(c: Config, new: bool = True) -> None:
    """It can be made; and where a new one moves an earlier one aside, nothing that the run needs
    moves along."""
    place = Path(c.run.dir).resolve()
    for folder in (place, *place.parents):
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"run.dir = {c.run.dir!r}: {folder} is a file")
    for key, name in {**c.inputs, "the working directory": "."}.items():
        if new and Path(name).exists() and Path(name).resolve().is_relative_to(place):
            raise ConfigError(
                f"run.dir = {c.run.dir!r}: holds {key} = {name!r}, and a new run moves it aside"
            )
