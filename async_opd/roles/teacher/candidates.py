"""What a teacher can say of a rollout and its candidates: which ids it knows, what its likeliest
leave for the rest, and why it says nothing."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from async_opd.core.errors import AsyncOpdError, WireError, first_line
from async_opd.core.message import check_rows
from async_opd.core.role_settings import ScorerSettings
from async_opd.core.vocabulary import exchanged
from async_opd.core.wire import Floats, Ints, Needs, Rollout, Scores

Outcome = Scores | AsyncOpdError  # of one rollout
Answer = tuple[tuple[str, ...], tuple[Scores | None, ...]]

# Of the probability; what float32 log-probs leave of 1 below it is their rounding.
TAIL_FLOOR = 1e-6


class Columns(NamedTuple):
    """What a backend without a whole distribution tells of T tokens, in the ids of its model."""

    sampled_logp: Floats  # float32 [T]
    topk_ids: Ints  # int32 [T, K], the likeliest first
    topk_logp: Floats  # float32 [T, K]
    candidate_logp: Floats | None  # float32 [T, K], at the rollout's candidates


def candidates_of(rollout: Rollout) -> np.ndarray:
    """Return its candidates' ids, int32 [T, K]. Raises WireError where it has none."""
    if rollout.candidate_ids is None:
        raise WireError(f"{rollout.id}: has no candidate_ids, which the teacher is to read")
    return rollout.candidate_ids


def refuse_unknown_ids(prompt: Ints, rollout: Rollout, logits: int, needs: Needs) -> None:
    """Raise WireError for a rollout that has failed by itself, or for an id of it, of its prompt,
    or of the candidates that `needs` wants scored, that a teacher of so many logits has not."""
    if rollout.failure:
        raise WireError(rollout.failure)
    asked = {"the prompt": prompt, "ids": rollout.ids}
    if needs.teacher_at_student_ids:
        asked["candidate_ids"] = candidates_of(rollout)
    for field, ids in asked.items():
        strange = ids[(ids < 0) | (ids >= logits)]
        if strange.size:
            raise WireError(
                f"{rollout.id}: {field} holds {strange[0]}: must be < {logits}, the number of the"
                " teacher's logits"
            )


def tail_left_by(logp_TK: np.ndarray) -> np.ndarray:
    """Take the log of what candidates leave of 1, float32 [T], for a backend that gives the
    log-probs of these alone.

    log max(1 - Σ_k p_k, TAIL_FLOOR)
    """
    left_T = 1 - np.exp(logp_TK, dtype=np.float64).sum(1)
    return np.log(np.maximum(left_T, TAIL_FLOOR)).astype(np.float32)


def scores_of(rollout: Rollout, columns: Columns, settings: ScorerSettings, needs: Needs) -> Scores:
    """Make scores of what was told of `rollout`. Raises WireError for what is no log-prob."""
    topk, at_ids = needs.teacher_topk > 0, columns.candidate_logp
    return Scores(
        id=rollout.id,
        sampled_logp=columns.sampled_logp,
        topk_ids=exchanged(columns.topk_ids, settings.ends_as) if topk else None,
        topk_logp=columns.topk_logp if topk else None,
        candidate_logp=at_ids,
        tail_logp=tail_left_by(columns.topk_logp if at_ids is None else at_ids)
        if needs.tail
        else None,
    )


def matched(rollout: Rollout, scores: Scores) -> Scores:
    """`scores`, where they are those of `rollout`, one row for each of its tokens. Raises
    WireError."""
    if scores.id != rollout.id:
        raise WireError(f"{rollout.id}: its scores are those of {scores.id}")
    check_rows(rollout.id, "sampled_logp", scores.sampled_logp, len(rollout.ids))
    return scores


def answer(outcomes: Sequence[Outcome]) -> Answer:
    """What is sent of the `outcomes` of a group's rollouts: why each has no scores, "" where it
    has, and the scores, None where there are none."""
    causes = [first_line(o) if isinstance(o, AsyncOpdError) else "" for o in outcomes]
    scores = [None if isinstance(o, AsyncOpdError) else o for o in outcomes]
    return tuple(causes), tuple(scores)
