"""Everything that crosses a process boundary. Nothing else does.

Shapes: `P` prompt tokens, `T` response tokens, `K` candidates a position, `G` samples of one
prompt. Log-probs are in nats, of logits divided by the sampling temperature, normalised over the
whole vocabulary of the model that gave them. Arrays arrive read-only through Ray: they are values,
never buffers to write into. Invariants run on construction and on arrival, so a bad message fails
where it arrives, naming its id.
"""

from pickle import PickleBuffer
from typing import Any, Literal

import msgspec
import numpy as np

from async_opd.core.errors import WireError

LOGP_TOLERANCE = 1e-4  # nats a log-prob may exceed 0 by rounding


class Struct(msgspec.Struct, frozen=True, array_like=True):
    """Base of every message: immutable, pickled (protocol 5) as msgpack without field names, its
    arrays out of band."""

    def __reduce__(self):
        buffers = []

        def out_of_band(array: np.ndarray) -> tuple[str, tuple[int, ...]]:
            buffers.append(PickleBuffer(np.ascontiguousarray(array)))
            return array.dtype.char, array.shape

        return _arrive, (type(self), msgspec.msgpack.encode(self, enc_hook=out_of_band), *buffers)


def _arrive(kind: type[Struct], sent: bytes, *buffers: Any) -> Struct:
    """A message of `kind` as `Struct.__reduce__` sent it. Raises WireError where a field has
    another type."""
    left = iter(buffers)

    def array(_: type, form: Any) -> Any:
        match form:
            case [str(dtype), [*shape]]:
                return np.frombuffer(next(left), dtype).reshape(shape)
        return form  # of another type, which the decoder refuses

    try:
        return msgspec.msgpack.decode(sent, type=kind, dec_hook=array)
    except msgspec.ValidationError as e:
        id = msgspec.msgpack.decode(sent)
        while isinstance(id, list):  # a message begins with its id, or with a message that does
            id = id[0]
        raise WireError(f"{id}: {kind.__name__}: {e}") from e


class Prompt(Struct):
    """One prompt handed out once. Made by `rollout.prompts`; consumed by a generator."""

    id: str  # "<row id>@<epoch>", unique within a run
    ids: np.ndarray  # int32 [P]
    answer: str  # reference answer, for the verifier
    # int32 [P'] where the teacher renders the prompt its own way
    teacher_ids: np.ndarray | None = None
    attempt: int = 0  # how often it was re-issued
    teacher: str = ""  # name of the teacher that scores it, where there are several
    taught: bool = False  # the teacher itself is to answer it

    def __post_init__(self):
        for field in ("ids", "teacher_ids"):
            value = getattr(self, field)
            if value is not None:
                _array(self.id, field, value, np.int32, 1)
                if not len(value):
                    raise WireError(f"{self.id}: {field} is empty; a prompt has at least one token")

    @property
    def shown_to_teacher(self) -> np.ndarray:
        """As its teacher reads it."""
        return self.ids if self.teacher_ids is None else self.teacher_ids


class Sampling(Struct):
    """How an evaluation has a prompt responded to. Made by the driver; consumed by a generator."""

    samples: int = 1
    temperature: float = 0.0  # 0: the likeliest token each time
    top_p: float = 1.0


class Span(Struct):
    """Tokens [start, end) of one response were sampled under `version`. Made by a generator;
    consumed by the queue and the learner."""

    version: int
    start: int
    end: int


class Rollout(Struct):
    """One sampled response. Made by a generator; consumed by teacher, verifier and learner."""

    id: str  # "<prompt id>#<sample>"
    ids: np.ndarray  # int32 [T], the end token included
    behaviour_logp: np.ndarray  # float32 [T], under the weights that sampled each token
    spans: tuple[Span, ...]  # cover [0, T) in order, versions increasing
    truncated: bool  # cut by the length limit, so without an end token
    # int32 [T, K], ids of the behaviour policy that the teacher scores too
    candidate_ids: np.ndarray | None = None
    # float32 [T, K], under the behaviour policy, where they are samples of it
    candidate_logp: np.ndarray | None = None

    def __post_init__(self):
        _array(self.id, "ids", self.ids, np.int32, 1)
        if self.candidate_ids is not None:
            _array(self.id, "candidate_ids", self.candidate_ids, np.int32, 2)
            _rows(self.id, "candidate_ids", self.candidate_ids, len(self.ids))
        if self.candidate_logp is not None:
            _logp(self.id, "candidate_logp", self.candidate_logp, np.shape(self.candidate_ids))
        _logp(self.id, "behaviour_logp", self.behaviour_logp, self.ids.shape)
        at, version = 0, -1
        for span in self.spans:
            if span.start != at or span.end <= span.start or span.version <= version:
                raise WireError(
                    f"{self.id}: spans must be contiguous with increasing versions, got"
                    f" {self.spans}"
                )
            at, version = span.end, span.version
        if at != len(self.ids) or at == 0:
            raise WireError(
                f"{self.id}: spans cover {at} tokens of {len(self.ids)}; a response has at"
                " least one"
            )

    def versions(self) -> np.ndarray:
        """Version of each token, int32 [T]."""
        lengths = [span.end - span.start for span in self.spans]
        return np.repeat(np.array([span.version for span in self.spans], np.int32), lengths)


class Group(Struct):
    """All samples of one prompt: the unit of admission, queue and drop. Made by a generator;
    consumed by teacher, verifier and learner, which get it by reference: the driver never reads
    one."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]  # G of them


class GroupMeta(Struct):
    """What the driver may know of a group. Made by a generator; consumed by the queue and the
    packing."""

    id: str  # the prompt's
    prompt_len: int
    spans: tuple[tuple[Span, ...], ...]  # per sample
    truncated: tuple[bool, ...]  # per sample

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


class Needs(Struct):
    """What an objective wants supplied. Made by the objective; consumed by generator, teacher and
    learner."""

    teacher_topk: int = 0  # K: the teacher's K likeliest ids with their log-probs
    # K: the teacher's log-probs at the rollout's own `candidate_ids`, which are
    teacher_at_student_ids: int = 0
    # these of the behaviour policy at each position
    student_ids: Literal["likeliest", "sampled"] = "likeliest"
    tail: bool = False  # log-mass of all ids but these candidates, under student and teacher
    teacher_entropy: bool = False  # full-vocabulary entropy, nats
    reference: bool = False  # log-prob of the sampled token under the reference
    student_entropy: bool = False
    hidden_state: bool = False  # of the student, what its head reads
    groups: bool = False  # several samples of each prompt
    # statistics over the kept tokens of the whole step, from `Objective.statistics`
    sums: tuple[str, ...] = ()
    maxima: tuple[str, ...] = ()
    # they read the live student, at the price of one more forward of everything
    first_pass: bool = False
    # moments over the trajectories of all past steps, from `Objective.trajectory_statistics`
    running: tuple[str, ...] = ()


class Scores(Struct):
    """A teacher's view of one rollout's response positions. Made by a teacher; consumed by the
    learner."""

    id: str  # the rollout's
    sampled_logp: np.ndarray  # float32 [T]
    topk_ids: np.ndarray | None = None  # int32 [T, K]
    topk_logp: np.ndarray | None = None  # float32 [T, K]
    entropy: np.ndarray | None = None  # float32 [T], nats
    candidate_logp: np.ndarray | None = None  # float32 [T, K], at the rollout's candidate_ids
    # float32 [T], log-mass of all other ids than these, or than topk_ids
    tail_logp: np.ndarray | None = None

    def __post_init__(self):
        tokens = np.shape(self.sampled_logp)[:1]
        _logp(self.id, "sampled_logp", self.sampled_logp, tokens)
        if self.topk_ids is not None:
            _array(self.id, "topk_ids", self.topk_ids, np.int32, 2)
            _logp(self.id, "topk_logp", self.topk_logp, (*tokens, self.topk_ids.shape[1]))
        if self.candidate_logp is not None:
            _logp(
                self.id,
                "candidate_logp",
                self.candidate_logp,
                (*tokens, np.shape(self.candidate_logp)[-1]),
            )
        if self.tail_logp is not None:
            _logp(self.id, "tail_logp", self.tail_logp, tokens)
        if self.entropy is not None:
            _array(self.id, "entropy", self.entropy, np.float32, 1)
            _rows(self.id, "entropy", self.entropy, *tokens)
            if not (
                np.isfinite(self.entropy).all() and self.entropy.min(initial=0) >= -LOGP_TOLERANCE
            ):
                raise WireError(f"{self.id}: entropy must be finite and >= 0")


def matched(group: Group, scores: tuple[Scores, ...]) -> tuple[Scores, ...]:
    """`scores`, where they are one for each rollout of `group` and one row for each of its tokens.
    Raises WireError."""
    if [s.id for s in scores] != [rollout.id for rollout in group.rollouts]:
        raise WireError(
            f"{group.prompt.id}: scores of {[s.id for s in scores]} for {len(group.rollouts)}"
            " rollouts"
        )
    for rollout, s in zip(group.rollouts, scores, strict=True):
        _rows(rollout.id, "sampled_logp", s.sampled_logp, len(rollout.ids))
    return scores


class Verdict(Struct):
    """A verifier's word on one response. Made by the verifier pool; consumed by the driver and the
    learner.

    `correct` is None when the check timed out or crashed: unknown is not wrong.
    """

    id: str
    correct: bool | None
    # "timed out after 5.0 s", "worker died (signal 9)", …; empty when the check decided
    cause: str = ""
    # the part of the response that was read; "" where it holds none, None if nothing says
    answer: str | None = None


class Check(Struct):
    """One response to check. Made by the verifier pool; consumed by one of its worker processes."""

    id: str
    response: str
    answer: str


class Said(Struct):
    """What a response says. Made by the verifier; consumed by an evaluation."""

    text: str
    vote: int | None  # the first response of its group with the same answer; None: it has no vote


class Recorded(Struct):
    """One trained response as the objective saw it, for people to look at. Made by learner rank 0,
    of a few only; consumed by the recorder, which writes `samples.jsonl`."""

    id: str  # the rollout's
    step: int
    prompt_ids: np.ndarray  # int32, the last of them where there are many
    ids: np.ndarray  # int32 [T'], the first T' of the response
    prompt_tokens: int
    tokens: int  # T
    truncated: bool
    correct: bool | None
    numbers: dict[str, np.ndarray]  # float32 [T'] by name

    def __post_init__(self):
        _array(self.id, "prompt_ids", self.prompt_ids, np.int32, 1)
        _array(self.id, "ids", self.ids, np.int32, 1)
        for name, value in self.numbers.items():
            _array(self.id, name, value, np.float32, 1)
            _rows(self.id, name, value, len(self.ids))


class StepResult(Struct):
    """What one optimizer step did. Made by the learner, reduced over ranks; consumed by the
    driver."""

    version: int  # of the weights after the step
    metrics: dict[str, float]
    recorded: tuple[Recorded, ...] = ()  # where the step is one to be recorded


def _array(id: str, field: str, value: Any, dtype: type, ndim: int) -> None:
    if not isinstance(value, np.ndarray) or value.dtype != dtype or value.ndim != ndim:
        got = (
            f"{value.dtype} {value.shape}"
            if isinstance(value, np.ndarray)
            else type(value).__name__
        )
        raise WireError(f"{id}: {field} must be a {ndim}-d {np.dtype(dtype)} array, got {got}")


def _logp(id: str, field: str, value: Any, shape: tuple[int, ...]) -> None:
    _array(id, field, value, np.float32, len(shape))
    if value.shape != shape:
        raise WireError(f"{id}: {field} has shape {value.shape}, expected {shape}")
    if value.size and not (np.isfinite(value).all() and value.max() <= LOGP_TOLERANCE):
        at = int(np.argmax(~np.isfinite(value.ravel()) | (value.ravel() > LOGP_TOLERANCE)))
        raise WireError(f"{id}: {field}[{at}] = {value.ravel()[at]} is not a finite log-prob <= 0")


def _rows(id: str, field: str, value: np.ndarray, rows: int) -> None:
    if len(value) != rows:
        raise WireError(f"{id}: {field} has {len(value)} rows for {rows} tokens")
