"""Rollouts from a JSON file, and the batch that an objective sees of them.

The file is {"step": 1, "running": {"reward": {"count": n, "mean": m, "squares": s}},
"trajectories": [{…}, …]}. A trajectory has the fields of `Trajectory`; what the objective does not
read may be left out. Trajectories of one `prompt` are a group. `running` holds the moments of all
past steps, `squares` being Σ(x - mean)².
"""

import json
import re
import zlib
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from msgspec import UNSET, Meta, UnsetType
from torch import Tensor

from async_opd.core.errors import DataError
from async_opd.core.foreign import foreign
from async_opd.core.reading import read_named
from async_opd.core.suggest import wrong
from async_opd.core.wire import LOGP_TOLERANCE
from async_opd.maths.advantages import Moments
from async_opd.objectives import Objective
from async_opd.objectives.token_batch import TokenBatch

LOGP = (-torch.inf, LOGP_TOLERANCE, "a finite log-prob <= 0")
ENTROPY = (-LOGP_TOLERANCE, torch.inf, "a finite entropy >= 0")
FINITE = (-torch.inf, torch.inf, "a finite number")
CARRIES_GRADIENT = vars(torch._C.TensorBase)["requires_grad"].__get__


class Struct(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of what the file holds."""


class Candidate(Struct, frozen=True):
    """One of K tokens at a position beside the generated one: the likeliest, or samples of the
    behaviour policy."""

    student_logp: float
    teacher_logp: float
    behaviour_logp: float | UnsetType = UNSET  # of samples
    token: str | int = ""  # shown as it is


class Trajectory(Struct, frozen=True):
    """One response of T tokens; log-probs and entropies in nats."""

    prompt: str | int | UnsetType = UNSET
    tokens: list[str | int] | UnsetType = UNSET  # shown as they are
    student_logp: list[float] | UnsetType = UNSET
    behaviour_logp: list[float] | UnsetType = UNSET
    teacher_logp: list[float] | UnsetType = UNSET
    reference_logp: list[float] | UnsetType = UNSET
    student_entropy: list[float] | UnsetType = UNSET
    teacher_entropy: list[float] | UnsetType = UNSET
    hidden: list[list[float]] | UnsetType = UNSET  # [T][D]
    candidates: list[list[Candidate]] | UnsetType = UNSET  # [T][K]
    student_tail_logp: list[float] | UnsetType = UNSET  # log-mass of all others than the candidates
    teacher_tail_logp: list[float] | UnsetType = UNSET
    reward: Annotated[float, Meta(ge=0, le=1)] | UnsetType | None = UNSET  # null: unknown
    length_cap: Annotated[int, Meta(ge=1)] | UnsetType = UNSET  # most tokens a response may have

    @property
    def length(self) -> int:
        """T, by the first field that tells."""
        return next((len(value) for value in self.per_token.values()), 0)

    @property
    def per_token(self) -> dict[str, list[Any]]:
        """What is given of each token, by field."""
        return {
            name: value
            for name in self.__struct_fields__
            if isinstance(value := getattr(self, name), list)
        }


class PastMoments(Struct, frozen=True):
    """Of one quantity, over all past steps."""

    count: Annotated[float, Meta(gt=0)]
    mean: float
    squares: Annotated[float, Meta(ge=0)]


class Running(Struct, frozen=True):
    """Past moments by what they are of."""

    reward: PastMoments | UnsetType = UNSET


class Rollouts(Struct, frozen=True):
    """The file."""

    trajectories: Annotated[list[Trajectory], Meta(min_length=1)]
    step: Annotated[int, Meta(ge=1)] = 1  # the optimizer step that is being made
    running: Running = Running()


KINDS = {
    "": Rollouts,
    "trajectories": Trajectory,
    "candidates": Candidate,
    "running": Running,
    "reward": PastMoments,
}


def read(path: str | Path) -> Rollouts:
    """Read the rollouts in a JSON file. Raises DataError naming the file, the place and what is
    wrong."""
    content = read_named(f"{path}", path, DataError)
    with foreign(f"{path} is not JSON"):
        tree = json.loads(content.decode("utf-8-sig"))
        json.dumps(tree, ensure_ascii=False).encode()  # halves of characters are no text
    try:
        return msgspec.convert(tree, Rollouts)
    except msgspec.ValidationError as e:
        raise DataError(f"{path}: {_in_words(str(e))}") from e


def _in_words(message: str) -> str:
    """Repeat a message of msgspec's, with the allowed names where one is unknown."""
    pattern = r"Object contains unknown field `([^`]*)`(?: - at `\$\.(.*)`)?"
    if not (unknown := re.fullmatch(pattern, message)):
        return message
    place = unknown[2] or ""
    kind = KINDS[re.sub(r"\[.*?\]", "", place).split(".")[-1]]
    return wrong(f"{place or 'top level'}: field", unknown[1], kind.__struct_fields__)


class Absent(Tensor):
    """Stands for what the file leaves out: it has a length, and whatever reads its values raises
    DataError. So what an objective needs is what it reads."""

    message: str  # of each subclass

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if function not in (Tensor.__len__, Tensor.new_ones, Tensor.new_full, CARRIES_GRADIENT):
            raise DataError(cls.message)
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))


class BatchReader:
    """Makes the batch of `rollouts`, which were read from `file`, for `objective`."""

    def __init__(self, objective: Objective, rollouts: Rollouts, file: str | Path):
        self._tag, self._needs = objective.tag, objective.needs()
        self._rollouts, self._file = rollouts, file
        self._trajectories = rollouts.trajectories
        self._count = sum(t.length for t in rollouts.trajectories)

    def batch(self) -> TokenBatch:
        """Collect all tokens of all trajectories, float64; student log-probs are leaves that take
        gradients. Raises DataError, here for what cannot be, and from the objective for what it
        reads and the file lacks."""
        self._check_lengths()
        lengths = torch.tensor([t.length for t in self._trajectories])
        prompts = self._values("prompt")
        return TokenBatch(
            student_logp_N=_leaf(self._tokens("student_logp", LOGP)),
            behaviour_logp_N=self._tokens("behaviour_logp", LOGP),
            teacher_logp_N=self._tokens("teacher_logp", LOGP),
            reference_logp_N=self._tokens("reference_logp", LOGP),
            student_entropy_N=self._tokens("student_entropy", ENTROPY),
            teacher_entropy_N=self._tokens("teacher_entropy", ENTROPY),
            hidden_ND=self._tokens("hidden", FINITE),
            student_logp_NK=_leaf(self._candidates("student_logp")),
            behaviour_logp_NK=self._candidates("behaviour_logp"),
            teacher_logp_NK=self._candidates("teacher_logp"),
            student_tail_logp_N=_leaf(self._tokens("student_tail_logp", LOGP)),
            teacher_tail_logp_N=self._tokens("teacher_tail_logp", LOGP),
            segment_N=torch.repeat_interleave(lengths),
            key_S=torch.tensor(
                # of the prompt and the place in its group
                [zlib.crc32(f"{p}#{prompts[:i].count(p)}".encode()) for i, p in enumerate(prompts)]
            ),
            reward_S=self._each("reward"),
            group_reward_SG=self._group_rewards(),
            cap_S=self._each("length_cap"),
            step=self._rollouts.step,
            running={name: self._moments(name) for name in self._needs.running},
        )

    def _check_lengths(self) -> None:
        for i, t in enumerate(self._trajectories):
            lengths = {name: len(value) for name, value in t.per_token.items()}
            if t.length < 1:
                raise DataError(f"{self._at(i)}: holds no token")
            if len(set(lengths.values())) > 1:
                raise DataError(f"{self._at(i)}: lengths differ: {lengths}")
            if t.length_cap is not UNSET and t.length > t.length_cap:
                raise DataError(
                    f"{self._at(i)}.length_cap = {t.length_cap}: must be >= its {t.length} tokens"
                )

    def _tokens(self, field: str, bounds: tuple[float, float, str]) -> Tensor:
        """Join a field of every token, [N] or [N, D]."""
        lacking = self._lacking(field, self._count)
        return self._joined(field, self._values(field), bounds) if lacking is None else lacking

    def _candidates(self, field: str) -> Tensor | None:
        """Join a field of every candidate, [N, K]; None where the objective wants none."""
        wanted = self._needs.teacher_topk or self._needs.teacher_at_student_ids
        if not wanted or (lacking := self._lacking("candidates", self._count)) is not None:
            return lacking if wanted else None
        candidates = self._values("candidates")
        for i, rows in enumerate(candidates):
            for place, row in enumerate(rows):
                position = f"{self._at(i)}.candidates[{place}] has"
                if len(row) != wanted:
                    raise DataError(
                        f"{position} {len(row)} candidates:"
                        f" must be {wanted} for objective {self._tag}"
                    )
                if any(getattr(candidate, field) is UNSET for candidate in row):
                    return self._absent(f"{position} no {field}", self._count)
        values = [[[getattr(c, field) for c in row] for row in rows] for rows in candidates]
        return self._joined(f"candidates.{field}", values, LOGP)

    def _each(self, field: str) -> Tensor:
        """Collect a field of every trajectory, [S]; NaN for null."""
        if (lacking := self._lacking(field, len(self._trajectories))) is not None:
            return lacking
        return torch.tensor(
            [torch.nan if value is None else value for value in self._values(field)],
            dtype=torch.float64,
        )

    def _group_rewards(self) -> Tensor:
        """Collect the rewards of all trajectories of the same prompt, [S, G]; NaN where there is
        none."""
        reward_S, prompts = self._each("reward"), self._values("prompt")
        for lacking in (self._lacking("prompt", len(prompts)), reward_S):
            if isinstance(lacking, Absent):
                return lacking
        groups = [reward_S[torch.tensor([p == other for other in prompts])] for p in prompts]
        return torch.nn.utils.rnn.pad_sequence(groups, True, torch.nan)

    def _moments(self, name: str) -> Moments:
        past = getattr(self._rollouts.running, name)
        if past is UNSET:
            # for numbers: it raises where they are read
            lacking: Any = self._absent(
                f"{self._file} has no running.{name} at step {self._rollouts.step}", 0
            )
            return Moments(lacking, lacking, lacking)
        numbers = [past.count, past.mean, past.squares]
        return Moments(*_checked(f"{self._file}: running.{name}", numbers, FINITE).tolist())

    def _values(self, field: str) -> list[Any]:
        return [getattr(t, field) for t in self._trajectories]

    def _joined(
        self, field: str, values: list[list[Any]], bounds: tuple[float, float, str]
    ) -> Tensor:
        parts = [
            _checked(f"{self._at(i)}.{field}", value, bounds) for i, value in enumerate(values)
        ]
        if len({part.shape[1:] for part in parts}) > 1:
            raise DataError(f"{self._file}: {field} has rows of different lengths")
        return torch.cat(parts)

    def _lacking(self, field: str, length: int) -> Absent | None:
        """Make a stand-in of that length where a trajectory lacks the field."""
        lacking = [i for i, value in enumerate(self._values(field)) if value is UNSET]
        return self._absent(f"{self._at(lacking[0])} has no {field}", length) if lacking else None

    def _absent(self, what: str, length: int) -> Absent:
        kind = type("Absent", (Absent,), {"message": f"{what}, which objective {self._tag} needs"})
        return torch.empty(length, dtype=torch.float64).as_subclass(kind)

    def _at(self, index: int) -> str:
        return f"{self._file}: trajectories[{index}]"


def _checked(place: str, values: list[Any], bounds: tuple[float, float, str]) -> Tensor:
    try:
        numbers = torch.tensor(values, dtype=torch.float64)
    except ValueError as e:
        raise DataError(f"{place}: rows of different lengths") from e
    low, high, allowed = bounds
    broken = (~(numbers.isfinite() & (numbers >= low) & (numbers <= high))).nonzero()
    if len(broken):
        index = "".join(f"[{i}]" for i in broken[0].tolist())
        raise DataError(f"{place}{index} = {numbers[tuple(broken[0])].item()}: must be {allowed}")
    return numbers


def _leaf(logp: Tensor | None) -> Tensor | None:
    return logp if logp is None or isinstance(logp, Absent) else logp.requires_grad_()
