"""Every message between the roles and the driver, those of `core.recorded` and `core.weights` among
them. Besides them only what a role is built with crosses a process boundary: `core.role_settings`,
its section of the config, the objective.

Shapes: `P` prompt tokens, `T` response tokens, `K` candidates a position, `G` samples of one
prompt. Log-probs are in nats, of logits divided by the sampling temperature, normalised over the
whole vocabulary of the model that gave them, which is that of its tokenizer: rows that pad its head
are none of it. Arrays arrive read-only through Ray: they are values, never buffers to write into.
Invariants run on construction and on arrival, so a bad message fails where it arrives, naming its
id.
"""

from collections.abc import Mapping
from typing import Literal

import numpy as np
import numpy.typing as npt

from async_opd.core.errors import WireError
from async_opd.core.message import LOGP_TOLERANCE, Struct, check_array, check_logp, check_rows
from async_opd.core.recorded import RecordedTrajectory

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]


class Prompt(Struct, frozen=True):
    """One prompt handed out once. Made by `roles.rollout.prompts`; consumed by a generator."""

    id: str  # "<row id>@<epoch>", unique within a run
    ids: Ints  # int32 [P]
    answer: str  # reference answer, for the verifier
    # int32 [P'] where the teacher renders the prompt its own way
    teacher_ids: Ints | None = None
    attempt: int = 0  # how often it was re-issued
    teacher: str = ""  # name of the teacher that scores it, where there are several
    row: int = 0  # place of its row among all rows of the run's data, the same in every epoch

    def __post_init__(self) -> None:
        for field in ("ids", "teacher_ids"):
            value = getattr(self, field)
            if value is not None:
                check_array(self.id, field, value, np.int32, 1)
                if not len(value):
                    raise WireError(f"{self.id}: {field} is empty; a prompt has at least one token")

    @property
    def shown_to_teacher(self) -> Ints:
        """As its teacher reads it."""
        return self.ids if self.teacher_ids is None else self.teacher_ids


class Sampling(Struct, frozen=True):
    """How an evaluation has a prompt responded to. Made by the driver; consumed by a generator."""

    samples: int = 1
    temperature: float = 0.0  # 0: the likeliest token each time
    top_p: float = 1.0


class Span(Struct, frozen=True):
    """Tokens [start, end) of one response were sampled under `version`. Made by a generator;
    consumed by the queue and the learner."""

    version: int
    start: int
    end: int


class Rollout(Struct, frozen=True):
    """One sampled response. Made by a generator; consumed by teacher, verifier and learner."""

    id: str  # "<prompt id>#<sample>"
    ids: Ints  # int32 [T], the end token included
    behaviour_logp: Floats  # float32 [T], under the weights that sampled each token
    spans: tuple[Span, ...]  # cover [0, T) in order, versions increasing
    truncated: bool  # cut by the length limit, so without an end token
    # int32 [T, K], ids of the behaviour policy that the teacher scores too
    candidate_ids: Ints | None = None
    # float32 [T, K], under the behaviour policy, where they are samples of it
    candidate_logp: Floats | None = None
    failure: str = ""  # why it is not scored or trained: its log-probs are none
    stop_tokens: int = 0  # the last of T, which spell what of rollout.stop has ended it
    kept_kv: bool = False  # updates left the KV of its context as it was: sync.kv = "keep"

    def __post_init__(self) -> None:
        check_array(self.id, "ids", self.ids, np.int32, 1)
        if self.candidate_ids is not None:
            check_array(self.id, "candidate_ids", self.candidate_ids, np.int32, 2)
            check_rows(self.id, "candidate_ids", self.candidate_ids, len(self.ids))
        if self.candidate_logp is not None and not self.failure:
            shape = () if self.candidate_ids is None else self.candidate_ids.shape
            check_logp(self.id, "candidate_logp", self.candidate_logp, shape)
        if not self.failure:
            check_logp(self.id, "behaviour_logp", self.behaviour_logp, self.ids.shape)
        end, version = 0, -1
        for span in self.spans:
            if span.start != end or span.end <= span.start or span.version <= version:
                raise WireError(
                    f"{self.id}: spans must be contiguous with increasing versions, got"
                    f" {self.spans}"
                )
            end, version = span.end, span.version
        if end != len(self.ids) or end == 0:
            raise WireError(
                f"{self.id}: spans cover {end} tokens of {len(self.ids)}; a response has at"
                " least one"
            )

    def versions(self) -> Ints:
        """Version of each token, int32 [T]."""
        lengths = [span.end - span.start for span in self.spans]
        return np.repeat(np.array([span.version for span in self.spans], np.int32), lengths)


class Group(Struct, frozen=True):
    """All samples of one prompt: the unit of admission, queue and drop. Made by a generator;
    consumed by teacher, verifier and learner, by reference: the driver never reads one."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]  # G of them


class GroupMeta(Struct, frozen=True):
    """What the driver may know of a group. Made by a generator; consumed by the queue and the
    packing."""

    id: str  # the prompt's
    prompt_len: int
    spans: tuple[tuple[Span, ...], ...]  # per sample
    truncated: tuple[bool, ...]  # per sample
    failures: tuple[str, ...] = ()  # per sample, or none for nobody's: `Rollout.failure`

    @property
    def lengths(self) -> tuple[int, ...]:
        """Response tokens per sample."""
        return tuple(spans[-1].end for spans in self.spans)

    @property
    def tokens(self) -> int:
        """What there is to score: prompt and response of every sample."""
        return self.prompt_len * len(self.spans) + sum(self.lengths)

    @property
    def oldest(self) -> int:
        """Version of the oldest token of the group."""
        return min(spans[0].version for spans in self.spans)


class Needs(Struct, frozen=True):
    """What an objective wants supplied. Made by the objective; consumed by generator, teacher and
    learner."""

    teacher_topk: int = 0  # K: the teacher's K likeliest ids with their log-probs
    teacher_at_student_ids: int = 0  # K: its log-probs at the rollout's own `candidate_ids`
    # which ids of the behaviour policy those are, at each position
    student_ids: Literal["likeliest", "sampled"] = "likeliest"
    tail: bool = False  # log-mass of all ids but these candidates, under student and teacher
    teacher_entropy: bool = False  # full-vocabulary entropy, nats
    reference: bool = False  # log-prob of the sampled token under the reference
    student_entropy: bool = False
    hidden_state: bool = False  # of the student, what its head reads
    groups: bool = False  # several samples of each prompt
    # statistics over the kept tokens of the whole step, of `Objective.token_statistics`
    sums: tuple[str, ...] = ()
    maxima: tuple[str, ...] = ()
    # sums of `Objective.trajectory_statistics` over the responses that hold a kept token
    response_sums: tuple[str, ...] = ()
    # sums over each group, of all its response tokens, of `Objective.token_statistics`
    group_sums: tuple[str, ...] = ()
    # they read the live student, at the price of one more forward of everything
    first_pass: bool = False
    # moments over the trajectories of all past steps, from `Objective.moments`
    running: tuple[str, ...] = ()


class Scores(Struct, frozen=True):
    """A teacher's view of one rollout's response positions. Made by a teacher; consumed by the
    learner."""

    id: str  # the rollout's
    sampled_logp: Floats  # float32 [T]
    topk_ids: Ints | None = None  # int32 [T, K]
    topk_logp: Floats | None = None  # float32 [T, K]
    entropy: Floats | None = None  # float32 [T], nats
    candidate_logp: Floats | None = None  # float32 [T, K], at the rollout's candidate_ids
    # float32 [T], log-mass of all other ids than these, or than topk_ids
    tail_logp: Floats | None = None

    def __post_init__(self) -> None:
        tokens = np.shape(self.sampled_logp)[:1]
        check_logp(self.id, "sampled_logp", self.sampled_logp, tokens)
        if self.topk_ids is not None:
            check_array(self.id, "topk_ids", self.topk_ids, np.int32, 2)
            check_logp(self.id, "topk_logp", self.topk_logp, (*tokens, self.topk_ids.shape[1]))
        if self.candidate_logp is not None:
            check_logp(
                self.id,
                "candidate_logp",
                self.candidate_logp,
                (*tokens, np.shape(self.candidate_logp)[-1]),
            )
        if self.tail_logp is not None:
            check_logp(self.id, "tail_logp", self.tail_logp, tokens)
        if self.entropy is not None:
            check_array(self.id, "entropy", self.entropy, np.float32, 1)
            check_rows(self.id, "entropy", self.entropy, *tokens)
            if not (
                np.isfinite(self.entropy).all() and self.entropy.min(initial=0) >= -LOGP_TOLERANCE
            ):
                raise WireError(f"{self.id}: entropy must be finite and >= 0")


class Verdict(Struct, frozen=True):
    """A verifier's word on one response. Made by the verifier pool; consumed by the driver and the
    learner.

    `reward` is 1 of a right response, 0 of a wrong one, between them where a check of the user's
    gives a share; None when the check timed out or crashed: unknown is not wrong.
    """

    id: str
    reward: float | None
    # "timed out after 5.0 s", "worker died (signal 9)", …; empty when the check decided
    cause: str = ""
    # the part of the response that was read; "" where it holds none, None if nothing says
    answer: str | None = None

    def __post_init__(self) -> None:
        if self.reward is not None and not 0 <= self.reward <= 1:
            raise WireError(f"{self.id}: reward = {self.reward}: must be from 0 to 1, or None")

    @property
    def correct(self) -> bool | None:
        """Whether it is right, which a share is not, however large; None where that is unknown."""
        return None if self.reward is None else self.reward == 1


class Check(Struct, frozen=True):
    """One response to check. Made by the verifier pool; consumed by one of its worker processes."""

    id: str
    response: str
    answer: str


class Ballot(Struct, frozen=True):
    """What a response says. Made by the verifier; consumed by an evaluation."""

    text: str
    vote: int | None  # the first response of its group with the same answer; None: it has no vote


class LearnerShare(Struct, frozen=True):
    """What one learner rank trains in a step, beside the groups and scores that it gets by
    reference. Made by the driver; consumed by the learner."""

    # per micro-batch, pairs of (index of group, sample)
    micro_batches: tuple[tuple[tuple[int, int], ...], ...]
    verdicts: tuple[tuple[Verdict, ...], ...]  # of all samples, by group
    # groups of the student's, by index, that no pool's teacher has scored: the rank does
    by_learner: tuple[int, ...] = ()
    # of each group, its number among those of the step; none: these are all of the step
    numbers: tuple[int, ...] = ()
    total: int = 0  # groups of the step

    @property
    def groups(self) -> int:
        """Groups of the step, over all ranks."""
        return self.total or len(self.verdicts)

    def number(self, group: int) -> int:
        """Number in the step of a group, by its index here."""
        return self.numbers[group] if self.numbers else group


class Unscored(Struct, frozen=True):
    """A rollout that the learner could not score, and left out of its step. Made by the learner;
    consumed by the driver."""

    id: str  # the prompt's
    sample: int
    role: str  # section of the scorer
    why: str


class StepResult(Struct, frozen=True):
    """What one optimizer step did. Made by the learner, reduced over ranks; consumed by the
    driver."""

    version: int  # of the weights after the step
    metrics: dict[str, float]
    recorded: tuple[RecordedTrajectory, ...] = ()  # where the step is one to be recorded
    unscored: tuple[Unscored, ...] = ()


def trained_tokens(metrics: Mapping[str, float]) -> float:
    """Tokens that a step trained, the teacher's own answers among them, by its metrics."""
    return metrics["tokens"] + metrics.get("tokens_taught", 0)
