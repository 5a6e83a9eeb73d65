"""What a teacher can say of candidates: which ids it knows, and what its likeliest leave for the
rest."""

import numpy as np

from async_opd.core.errors import WireError
from async_opd.core.message import check_rows
from async_opd.core.wire import Group, Needs, Rollout, Scores

# Of the probability; what float32 log-probs leave of 1 below it is their rounding.
TAIL_FLOOR = 1e-6


def candidates_of(rollout: Rollout) -> np.ndarray:
    """Return its candidates' ids, int32 [T, K]. Raises WireError where it has none."""
    if rollout.candidate_ids is None:
        raise WireError(f"{rollout.id}: has no candidate_ids, which the teacher is to read")
    return rollout.candidate_ids


def refuse_unknown_ids(group: Group, logits: int, needs: Needs) -> None:
    """Raise WireError for a token of `group`, or of the candidates that `needs` wants scored, that
    a teacher of so many logits has not."""
    for rollout in group.rollouts:
        asked = {"ids": rollout.ids}
        if needs.teacher_at_student_ids:
            asked["candidate_ids"] = candidates_of(rollout)
        for field, ids in asked.items():
            if ids.max(initial=0) >= logits:
                raise WireError(
                    f"{rollout.id}: {field} holds {ids.max()}: must be < {logits}, the number of"
                    " the teacher's logits"
                )


def tail_left_by(logp_TK: np.ndarray) -> np.ndarray:
    """Take the log of what candidates leave of 1, float32 [T], for a backend that gives the
    log-probs of these alone.

    log max(1 - Σ_k p_k, TAIL_FLOOR)
    """
    left_T = 1 - np.exp(logp_TK, dtype=np.float64).sum(1)
    return np.log(np.maximum(left_T, TAIL_FLOOR)).astype(np.float32)


def matched(group: Group, scores: tuple[Scores, ...]) -> tuple[Scores, ...]:
    """`scores`, where they are one for each rollout of `group` and one row for each of its tokens.
    Raises WireError."""
    if [s.id for s in scores] != [rollout.id for rollout in group.rollouts]:
        raise WireError(
            f"{group.prompt.id}: scores of {[s.id for s in scores]} for {len(group.rollouts)}"
            " rollouts"
        )
    for rollout, s in zip(group.rollouts, scores, strict=True):
        check_rows(rollout.id, "sampled_logp", s.sampled_logp, len(rollout.ids))
    return scores
