"""The lag bound as arithmetic. Lag of a token: the learner's version at consumption - the version
it was sampled under.

Versions count optimizer steps; the initial weights are version 0.
"""

import numpy as np


def slots(outstanding_steps: float, groups_per_step: int) -> int:
    """Groups that may be outstanding: that many steps' worth. AsyncOPD's capacity semaphore,
    section 6.5, has one more than the bound.

    >>> slots(1, 16), slots(2.5, 16), slots(4 + 1, 16)
    (16, 40, 80)
    """
    return round(outstanding_steps * groups_per_step)


def fresh(versions: np.ndarray, live: int, max_lag_steps: int) -> np.ndarray:
    """Which tokens may be trained on: live - version ≤ bound. `versions` int32 [N]; returns bool
    [N].

    >>> fresh(np.array([0, 1, 2], np.int32), live=3, max_lag_steps=2).tolist()
    [False, True, True]
    """
    return live - versions <= max_lag_steps
