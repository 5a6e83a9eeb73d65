"""What a teacher can say of candidates: which ids it knows, and what its likeliest leave for the
rest."""

import numpy as np

from async_opd.core.errors import WireError
from async_opd.core.wire import Rollout

# of the probability; what float32 log-probs leave of 1 below it is their rounding
TAIL_FLOOR = 1e-6


def refuse_unknown_ids(rollout: Rollout, logits: int, *, candidates: bool) -> None:
    """Raise WireError for a token of `rollout`, or of its `candidates`, that a teacher of so many
    logits has not."""
    asked = {"ids": rollout.ids}
    if candidates:
        asked["candidate_ids"] = rollout.candidate_ids
    for field, ids in asked.items():
        if ids.max(initial=0) >= logits:
            limit = f"must be < {logits}, the number of the teacher's logits"
            raise WireError(f"{rollout.id}: {field} holds {ids.max()}: {limit}")


def tail_left_by(logp_TK: np.ndarray) -> np.ndarray:
    """Log of what candidates leave of 1, float32 [T], of a backend that gives the log-probs of
    these alone.

    log max(1 - Σ_k p_k, TAIL_FLOOR)
    """
    left_T = 1 - np.exp(logp_TK, dtype=np.float64).sum(1)
    return np.log(np.maximum(left_T, TAIL_FLOOR)).astype(np.float32)
