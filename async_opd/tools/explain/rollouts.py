"""Rollouts from a JSON file.

The file is {"step": 1, "running": {"reward": {"count": n, "mean": m, "squares": s}},
"trajectories": [{…}, …]}. A trajectory has the fields of `Trajectory`; what the objective does not
read may be left out. Trajectories of one `prompt` are a group. `running` holds the moments of all
past steps, `squares` being Σ(x - mean)².
"""

import json
import re
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, UnsetType

from async_opd.core.errors import DataError
from async_opd.core.foreign import foreign
from async_opd.core.reading import read_named
from async_opd.core.suggest import wrong


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
    # optimizer steps that the weights which sampled each token were behind
    lag: list[Annotated[int, Meta(ge=0)]] | UnsetType = UNSET
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
    task_reward: PastMoments | UnsetType = UNSET  # of `[objective.reward]`


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
    "task_reward": PastMoments,
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
