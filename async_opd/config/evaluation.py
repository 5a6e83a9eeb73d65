"""Settings of `async-opd eval`: which model, which problems, how its responses are sampled and
checked."""

from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from async_opd.config.data_rules import data_rules
from async_opd.config.load import apply_override, checked, read_toml
from async_opd.config.paths import (
    MODELS,
    base_of,
    check_data,
    check_model,
    check_run_dir,
    expand,
    local,
)
from async_opd.config.reading_rules import reading_rules
from async_opd.config.rules import check_rules
from async_opd.config.schema import Config
from async_opd.config.sections import RunConfig, StudentConfig, TimeoutConfig
from async_opd.config.tables import check_engine
from async_opd.config.teacher_rules import refuse_broken
from async_opd.core.errors import ConfigError
from async_opd.core.wire import Sampling
from async_opd.objectives.opd import Opd
from async_opd.roles.learner.config import LearnerConfig
from async_opd.roles.rollout.config import DataConfig, EngineConfig, RolloutConfig
from async_opd.roles.verifier.config import VerifyConfig


class ResponseConfig(EngineConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sampling of the responses that are evaluated."""

    # absent: what the longest prompt leaves of the context
    max_new_tokens: Annotated[int, Meta(ge=1)] | None = None
    # absent: k; more make every figure surer
    samples_per_prompt: Annotated[int, Meta(ge=1)] | None = None
    # 0: greedy; absent: that for one response, else 1
    temperature: Annotated[float, Meta(ge=0)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0


class PlaceConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The folder of the result, and the seed of the engines."""

    dir: str = "runs/eval"  # made new
    seed: Annotated[int, Meta(ge=0, lt=2**31)] = 0
    trust_remote_code: bool = False


class EvalRun(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An evaluation. Its words are those of a training config."""

    student: StudentConfig
    data: DataConfig
    k: Annotated[int, Meta(ge=1)] = 1  # of avg@k, pass@k and maj@k
    problems: Annotated[int, Meta(ge=1)] | None = None  # the first rows; absent: all
    run: PlaceConfig = msgspec.field(default_factory=PlaceConfig)
    rollout: ResponseConfig = msgspec.field(default_factory=ResponseConfig)
    verify: VerifyConfig = msgspec.field(default_factory=VerifyConfig)
    timeout: TimeoutConfig = msgspec.field(default_factory=TimeoutConfig)

    @property
    def sampling(self) -> Sampling:
        """Sampling of the responses to each problem."""
        samples, temperature = self.rollout.samples_per_prompt or self.k, self.rollout.temperature
        if temperature is None:
            temperature = 0.0 if samples == 1 else 1.0
        return Sampling(samples=samples, temperature=temperature, top_p=self.rollout.top_p)


def load_eval(subject: str, settings: list[str]) -> EvalRun:
    """Make the evaluation of a model, or of what a TOML file names, by `key.path=value` settings,
    checked. Raises ConfigError."""
    file = subject.endswith(".toml")
    tree = read_toml(subject) if file else {"student": {"model": subject}}
    for setting in settings:
        apply_override(tree, setting)
    if not file and not any(setting.startswith("data.path=") for setting in settings):
        raise ConfigError("eval: needs problems: --data PATH, a file, a folder or a hub id")
    expand(tree)
    asked = checked(tree, EvalRun)
    sampling, rollout = asked.sampling, asked.rollout
    samples = f"rollout.samples_per_prompt = {sampling.samples}"
    greedy = sampling.temperature == 0
    refuse_broken(
        [
            (sampling.samples < asked.k, f"{samples}: must be >= k = {asked.k}"),
            (
                greedy and sampling.samples > 1,
                f"{samples}: must be 1 at rollout.temperature = 0, where all would be the same",
            ),
            (
                greedy and sampling.top_p < 1,
                f"rollout.top_p = {sampling.top_p}: must be 1 at rollout.temperature = 0, which is"
                " greedy",
            ),
            (
                asked.student.lora is not None,
                "student.lora: trains an adapter, and an evaluation nothing; student.model may be"
                " an adapter's folder",
            ),
            (
                bool(asked.data.sources),
                "data.sources: an evaluation is of one set: set data.path",
            ),
            (
                asked.data.filter is not None,
                "data.filter: has no effect in an evaluation, which asks each problem once",
            ),
            *data_rules(asked.data),
            *reading_rules({}, asked.data, asked.student.model),
            *check_rules(asked.verify),
        ]
    )
    check_engine("rollout", asked.rollout)
    check_data("data.path", asked.data.path)
    model = asked.student.model
    folder = local("student.model", model, MODELS)
    if folder and (base := base_of(f"student.model = {model!r}", folder)):
        model, folder = base, local(f"the base of student.model = {model!r}", base, MODELS)
    if folder:
        tokens = rollout.max_new_tokens or 1
        check_model("student", model, folder, f"rollout.max_new_tokens = {tokens}", tokens)
    check_run_dir(run_config(asked))
    return asked


def run_config(asked: EvalRun) -> Config:
    """Make the config of a run whose generators and verifier do what is `asked`; nothing in it is
    trained."""
    shared = {name: getattr(asked.rollout, name) for name in EngineConfig.__struct_fields__}
    return Config(
        run=RunConfig(steps=1, **msgspec.structs.asdict(asked.run)),
        student=asked.student,
        data=asked.data,
        rollout=RolloutConfig(max_new_tokens=asked.rollout.max_new_tokens or 1, **shared),
        learner=LearnerConfig(trajectories_per_step=1, lr=1e-6),
        objective=Opd(),
        verify=asked.verify,
        timeout=asked.timeout,
    )
