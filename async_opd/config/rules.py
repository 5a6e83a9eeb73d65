"""Rules that span fields of a config. They are looked at in order, and the first broken one is
reported."""

from collections.abc import Iterator

from async_opd.config.base_rules import base_rules
from async_opd.config.data_rules import column_rules, data_rules, evaluated_rules
from async_opd.config.precision import precision_rules
from async_opd.config.reading_rules import reading_rules
from async_opd.config.schema import Config
from async_opd.config.server_rules import server_rules
from async_opd.config.teacher_rules import (
    Rule,
    backend_rules,
    form_rules,
    sampling_rules,
    sharing_rules,
    tag,
    teacher_rules,
    teacher_section,
)
from async_opd.core.lora import ENGINE_RANKS
from async_opd.core.suggest import wrong
from async_opd.roles.verifier.checks import kinds, known
from async_opd.roles.verifier.config import VerifyConfig


def rules(c: Config) -> Iterator[Rule]:
    """Yield every rule of a whole config."""
    yield from _objective_rules(c)
    yield from form_rules(c.teacher, c.teachers)
    yield from data_rules(c.data)
    yield from column_rules(c.named_teachers, c.data)
    yield from _batch_rules(c)
    teachers = {teacher_section(name): teacher for name, teacher in c.named_teachers.items()}
    yield from reading_rules(teachers, c.data, c.student.model)
    yield from teacher_rules(teachers, c.student.model, evaluated=c.eval is not None)
    if c.eval:
        yield from evaluated_rules(c.named_teachers, c.data)
    yield from backend_rules(c.scorers, c.data, c.rollout, c.objective)
    yield from base_rules(c)
    yield from server_rules(c.scorers, c.teacher_sampling, c.verify)
    yield (
        c.reference is not None and not c.objective.needs().reference,
        f"reference: has no effect with {tag(c.objective)}, which needs none",
    )
    yield (
        not c.rollout.train_stop and not c.rollout.stop,
        "rollout.train_stop = false: has no effect without rollout.stop",
    )
    if c.teacher_sampling:
        yield from sampling_rules(c.teacher_sampling, c.teacher, c.rollout)
    if c.run.share_gpu:
        yield from sharing_rules(c.engines, c.learner.ranks, c.sync.backend)
    yield from _step_rules(c)
    yield from _adapter_rules(c)
    yield from precision_rules(c)
    yield from _verifier_rules(c)


def _objective_rules(c: Config) -> list[Rule]:
    """List what the objective asks of rollouts."""
    needs, samples = c.objective.needs(), c.rollout.samples_per_prompt
    method, reward = c.objective.requirements(), c.objective.setting("reward.baseline")
    baseline = f"objective.reward.baseline = {reward!r}"
    return [
        (
            needs.groups and samples < 2,
            f"rollout.samples_per_prompt = {samples}: must be >= 2 for"
            f" {tag(c.objective) if method.groups else baseline}, which compares them",
        ),
        (
            bool(needs.running) and c.rollout.truncated == "drop",
            f"rollout.truncated = 'drop': must be 'train' or 'mask' for"
            f" {tag(c.objective) if method.running else baseline}, whose"
            " running mean would leave out what is dropped",
        ),
    ]


def _batch_rules(c: Config) -> list[Rule]:
    """List how the trajectories of a step divide into groups, ranks and micro-batches."""
    samples, learner = c.rollout.samples_per_prompt, c.learner
    per_step = f"learner.trajectories_per_step = {learner.trajectories_per_step}"
    longest = c.data.max_prompt_tokens + c.rollout.max_new_tokens
    return [
        (
            learner.trajectories_per_step % samples != 0,
            f"{per_step}: must be a multiple of rollout.samples_per_prompt = {samples}",
        ),
        (
            learner.ranks > learner.trajectories_per_step,
            f"learner.ranks = {learner.ranks}: must be <= {per_step}, or a rank has nothing to"
            " train",
        ),
        (
            learner.micro_batch_tokens < longest,
            f"learner.micro_batch_tokens = {learner.micro_batch_tokens}: must be >="
            f" data.max_prompt_tokens + rollout.max_new_tokens = {longest}",
        ),
    ]


def _step_rules(c: Config) -> list[Rule]:
    """List what the number of steps and the lag bound allow."""
    most = c.run.max_lag_steps + 1
    every = f"sync.every_steps = {c.sync.every_steps}"
    return [
        (
            c.sync.every_steps > most,
            f"{every}: must be <= run.max_lag_steps + 1 = {most}, for the last step before an"
            f" update trains tokens that are {c.sync.every_steps - 1} behind",
        ),
        (
            c.outstanding_steps > most,
            f"run.max_outstanding_steps = {c.outstanding_steps:g}: must be <= run.max_lag_steps + 1"
            f" = {most}, or tokens go over age",
        ),
        (
            c.sync.every_steps > c.outstanding_steps,
            f"{every}: must be <= run.max_outstanding_steps = {c.outstanding_steps:g}, for no slot"
            " is given back before an update",
        ),
        (
            c.learner.warmup_steps >= c.run.steps,
            f"learner.warmup_steps = {c.learner.warmup_steps}: must be < run.steps = {c.run.steps}",
        ),
    ]


def _adapter_rules(c: Config) -> list[Rule]:
    """List what the way of a student's adapter to the generators asks for."""
    rank = c.student.lora.rank if c.student.lora else 0
    impl = c.rollout.engine.get("model_impl", "auto")
    return [
        (
            c.sync.lora is not None and c.student.lora is None,
            f"sync.lora = {c.sync.lora!r}: has no effect without student.lora",
        ),
        (
            c.sync.lora == "adapter" and rank > ENGINE_RANKS[-1],
            f"student.lora.rank = {rank}: must be <= {ENGINE_RANKS[-1]} for sync.lora = 'adapter',"
            " as vLLM takes no larger adapter; 'merged' has no bound",
        ),
        (
            c.sync.lora == "adapter" and impl not in ("auto", "vllm"),
            f"rollout.engine.model_impl = {impl!r}: must be 'vllm' or 'auto' for sync.lora ="
            " 'adapter', as what vLLM runs by others' code was not seen to agree with the learner;"
            " 'merged' takes it",
        ),
    ]


def _verifier_rules(c: Config) -> list[Rule]:
    """List which waits bound which, and which checks there are."""
    return [
        (
            c.verify.timeout_s >= c.timeout.score_s,
            f"verify.timeout_s = {c.verify.timeout_s}: must be < timeout.score_s ="
            f" {c.timeout.score_s}, or one check that hangs ends the run",
        ),
        (
            c.timeout.stall_s <= c.sync.timeout_s,
            f"timeout.stall_s = {c.timeout.stall_s}: must be > sync.timeout_s ="
            f" {c.sync.timeout_s}, for which an engine that takes weights is silent",
        ),
        *check_rules(c.verify),
    ]


def check_rules(verify: VerifyConfig) -> list[Rule]:
    """List that there is such a check, and which settings are of which."""
    check = verify.check
    return [
        (not known(check), wrong("verify.check", check, [*kinds(), "package.module:function"])),
        (
            verify.tolerance is not None and check != "numeric",
            f"verify.tolerance = {verify.tolerance}: is of verify.check = 'numeric', not {check!r}",
        ),
        (
            verify.special_tokens and check in kinds(),
            "verify.special_tokens = true: is of a function of yours, and verify.check ="
            f" {check!r} reads text without them",
        ),
    ]
