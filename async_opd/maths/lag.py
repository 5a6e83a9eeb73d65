"""The lag bound as arithmetic. Lag of a token: the learner's version at consumption - the version
it was sampled under.

Versions count optimizer steps; the initial weights are version 0.
"""

from typing import Any, overload

import numpy as np
import numpy.typing as npt


def slots(outstanding_steps: float, groups_per_step: int) -> int:
    """Groups that may be outstanding: that many steps' worth. AsyncOPD's capacity semaphore,
    section 6.5, has one more than the bound.

    >>> slots(1, 16), slots(2.5, 16), slots(4 + 1, 16)
    (16, 40, 80)
    """
    return round(outstanding_steps * groups_per_step)


@overload
def fresh(versions: int, live: int, max_lag_steps: int) -> bool: ...
@overload
def fresh(
    versions: npt.NDArray[np.int32], live: int, max_lag_steps: int
) -> npt.NDArray[np.bool_]: ...
def fresh(versions: Any, live: int, max_lag_steps: int) -> Any:
    """Which tokens may be trained on: live - version ≤ bound. `versions` int32 [N], or the one of
    a single token; returns bool [N], or a single one.

    >>> fresh(np.array([0, 1, 2], np.int32), live=3, max_lag_steps=2).tolist()
    [False, True, True]
    """
    return live - versions <= max_lag_steps


def kv_lag(version_T: npt.NDArray[np.int32], prompt_tokens: int) -> npt.NDArray[np.float32]:
    """How many versions the KV that a token attended to was behind the weights that sampled it,
    mean over its context of P `prompt_tokens` and the response before it: float32 [T]. KV that
    updates leave as it is, is of the weights that sampled the token behind it; that of the prompt,
    of those of the first token. `version_T` int32 [T], of at least one token.

    lag_t = v_t − (P·v_0 + Σ_{1≤i≤t} v_i) / (P + t)

    >>> kv_lag(np.array([1, 1, 2, 2], np.int32), prompt_tokens=2).tolist()
    [0.0, 0.0, 0.75, 0.6000000238418579]
    """
    behind_T = (version_T - version_T[0]).astype(np.float64)
    sums_T = behind_T.cumsum()
    return (behind_T - sums_T / (prompt_tokens + np.arange(len(version_T)))).astype(np.float32)
