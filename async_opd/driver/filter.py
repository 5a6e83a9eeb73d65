"""Which prompts are not handed out again, by how the student's own last tries at them came out."""

import base64
import zlib
from array import array
from collections import Counter
from collections.abc import Sequence
from typing import Any

from async_opd.core.ports import ScoredGroup
from async_opd.core.wire import Prompt, Verdict
from async_opd.driver.ledger import Ledger
from async_opd.roles.rollout.config import FilterConfig

RIGHT, WRONG = "always right", "always wrong"  # causes, in the books
MOST = 127  # tries in a row that are told apart: one byte a row
BOTH = ("always_right", "always_wrong")


class Filter:
    """Knows of each row how many of the last tries at it were right in a row, or wrong in a row.

    A try is the verdict on a rollout of the student's, of a group that was trained; unknown is
    none, and a reward between 0 and 1 is neither right nor wrong. What is dropped is tried no more,
    so it stays dropped, unless what is outstanding of an earlier epoch still comes out otherwise.
    """

    def __init__(self, config: FilterConfig, ledger: Ledger):
        """Drop as `config` says, and write it in the books of `ledger`."""
        drops = BOTH if config.drop == "both" else (config.drop,)
        # a row is dropped at or above the one, at or below the other
        self._right = config.tries if "always_right" in drops else MOST + 1
        self._wrong = -config.tries if "always_wrong" in drops else -MOST - 1
        self._tries = config.tries
        self._ledger = ledger
        self._streaks = array("b")  # by the row: n right in a row, -n wrong in a row
        self._dropped: Counter[str] = Counter()  # prompts

    def trained(self, batch: Sequence[ScoredGroup]) -> None:
        """Note the tries of the groups that a step trained."""
        for group in batch:
            row = group.prompt.row
            if row >= len(self._streaks):
                self._streaks.frombytes(bytes(row + 1 - len(self._streaks)))
            for verdict in group.student_verdicts:
                self._streaks[row] = _after(self._streaks[row], verdict)

    def cause(self, prompt: Prompt) -> str:
        """Why `prompt` is not to be handed out; empty where it is."""
        streak = self._streaks[prompt.row] if prompt.row < len(self._streaks) else 0
        if streak >= self._right:
            return RIGHT
        return WRONG if streak <= self._wrong else ""

    def dropped(self, id: str, cause: str) -> None:
        """Write in the books that a prompt whose turn it was is dropped."""
        self._ledger.handed_out(id)
        self._ledger.dropped(id, cause)
        self._dropped[cause] += 1

    @property
    def none_left(self) -> str:
        """Say that no prompt is left."""
        return (
            f"data.filter: no prompt is left: the last {self._tries} tries at each of an epoch were"
            " all right, or all wrong"
        )

    @property
    def counts(self) -> dict[str, int]:
        """How many prompts were dropped, in all."""
        return {
            "prompts_always_right": self._dropped[RIGHT],
            "prompts_always_wrong": self._dropped[WRONG],
        }

    @property
    def state(self) -> dict[str, Any]:
        """All that it knows, in plain JSON: about a byte a row."""
        streaks = base64.b64encode(zlib.compress(self._streaks.tobytes())).decode()
        return {"streaks": streaks, "dropped": dict(self._dropped)}

    def restore(self, state: dict[str, Any]) -> None:
        """Know what `state` says; nothing, of a checkpoint that was saved without a filter."""
        self._streaks = array("b")
        if state:
            self._streaks.frombytes(zlib.decompress(base64.b64decode(state["streaks"])))
        self._dropped = Counter(state.get("dropped", {}))


def _after(streak: int, verdict: Verdict) -> int:
    """Count one more try to a streak, which a reward between wrong and right ends."""
    if verdict.reward is None:
        return streak
    if verdict.correct:
        return min(max(streak, 0) + 1, MOST)
    return 0 if verdict.reward else max(min(streak, 0) - 1, -MOST)
