"""What a server's answer says of a response, in numbers, and what of an answer is none.

`T` tokens of the response; `K` ids beside each.
"""

from dataclasses import dataclass
from itertools import chain
from typing import TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from async_opd.core.errors import WireError
from async_opd.core.foreign import foreign
from async_opd.core.message import LOGP_TOLERANCE
from async_opd.core.wire import Floats, Ints

A = TypeVar("A")

MASS_TOLERANCE = 1e-3  # of the probability, by which rounding may take several beyond 1
# what vLLM writes for -∞, for which JSON has no word; no log-prob is as low
NO_LOGP = -9999.0


class NoLogProbs(WireError):
    """Numbers are no log-probs. The message names one."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """A sequence whose last tokens are to be scored."""

    model: str  # as the server calls it
    names: frozenset[str]  # that it may answer by
    ids: Ints  # int32 [P + T]
    tokens: int  # T, the last of them
    k: int  # likeliest ids to be told beside each
    logits: int  # rows of the model's head: ids are below
    temperature: float = 1.0
    candidates: Ints | None = None  # int32 [T, K], to be scored as well


@dataclass(frozen=True, kw_only=True)
class Told:
    """What a server tells of each token, by falling log-prob."""

    sampled: Floats  # float32 [T]
    ids: Ints  # int32 [T, k], the likeliest
    logp: Floats  # float32 [T, k]
    candidates: Floats | None = None  # float32 [T, K]


def decoded(content: bytes, kind: type[A]) -> A:
    """An answer of the shape of `kind`. Raises WireError."""
    with foreign("its answer is not of the form asked for", WireError):  # nested too deep, too
        return msgspec.json.decode(content, type=kind)


def refuse_rows(rows: int, tokens: int) -> None:
    """Raise WireError unless there is a row for each of so many tokens."""
    if rows != tokens:
        raise WireError(f"its answer has log-probs of {rows} tokens for {tokens}")


def checked(
    question: Question,
    sampled: list[float],
    likeliest: list[list[tuple[int, float]]],
    candidates: Floats | None = None,
) -> Told:
    """Put rows together, T of the sampled token and T of the `question.k` likeliest, in whatever
    order. Raises WireError for numbers that are no log-probs, too few, or of no ids."""
    refuse_rows(len(sampled), question.tokens)
    for t, row in enumerate(likeliest):
        if len(row) != question.k:
            raise WireError(f"token {t} has {len(row)} likeliest ids; {question.k} are asked for")
    flat = chain.from_iterable(chain.from_iterable(likeliest))
    pairs = np.fromiter(flat, np.float64).reshape(question.tokens, question.k, 2)
    wide = pairs[..., 0]
    if wide.size and not (wide.min() >= 0 and wide.max() < question.logits):
        strange = wide[(wide < 0) | (wide >= question.logits)].ravel()[0]
        raise WireError(f"a likeliest id is {strange:.0f}: must be < {question.logits}")
    if wide.shape[1] > 1 and not np.diff(np.sort(wide, axis=1), axis=1).all():
        raise WireError("a token has the same id twice among its likeliest")
    sampled_T = _logps("sampled", np.array(sampled))
    logp_TK = _logps("likeliest", pairs[..., 1])
    order_TK = np.argsort(-logp_TK, axis=1, kind="stable")
    ids_TK = np.take_along_axis(wide, order_TK, 1).astype(np.int32)
    mass = np.exp(logp_TK, dtype=np.float64).sum(1).max(initial=0)
    if mass > 1 + MASS_TOLERANCE:
        raise NoLogProbs(
            f"the probabilities of a token's {question.k} likeliest ids add up to {mass:.3g}: these"
            " are no log-probs"
        )
    return Told(
        sampled=sampled_T,
        ids=ids_TK,
        logp=np.take_along_axis(logp_TK, order_TK, 1),
        candidates=None if candidates is None else _logps("candidate", candidates),
    )


def _logps(which: str, values: npt.NDArray[np.floating]) -> Floats:
    """Take `values` as log-probs; what exceeds 0 by rounding is 0. Raises NoLogProbs."""
    wrong = ~np.isfinite(values) | (values > LOGP_TOLERANCE) | (values <= NO_LOGP)
    if wrong.any():
        place = np.argwhere(wrong)[0]
        raise NoLogProbs(
            f"the log-prob of a {which} id of token {place[0]} is {values[tuple(place)]:g}: must be"
            " finite and <= 0"
        )
    return np.minimum(values, 0).astype(np.float32)
