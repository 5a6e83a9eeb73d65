"""Phased teacher sampling: which prompts the teacher answers itself, and which of its answers are
trained."""

from collections import Counter
from collections.abc import Callable
from math import ceil, floor

from async_opd.core.ports import Generator, Ready, Ref
from async_opd.core.wire import GroupMeta, Prompt
from async_opd.driver.replica_pool import Pool

# why an answer is not trained
CAUSES = ("teacher_wrong", "teacher_unknown", "teacher_truncated", "teacher_late")


class Taught:
    """Gives a share of the prompts to the teacher's own generators while what they answer still has
    a weight.

    Its answers have no version, so they never age. Each request ends as a trained group or under
    one of CAUSES; then the student answers that prompt.
    """

    def __init__(
        self,
        *,
        share: float,
        weight: Callable[[int], float],
        generators: Pool[Generator],
        version: Callable[[], int],
        outstanding: Callable[[], int],
        keeps_truncated: bool,
    ):
        """`weight(step)` is 0 from some optimizer step on; `version()` is the live learner's,
        `outstanding()` how many groups hold a slot. A right answer that was cut is trained only
        where `keeps_truncated`."""
        self._share = share
        self._weight = weight
        self._generators = generators
        self.version = version
        self.outstanding = outstanding
        self._keeps_truncated = keeps_truncated
        self._admitted = 0
        self._requested = 0
        self._trained = 0

    def teaches(self, step: int) -> bool:
        """Whether the teacher's answers have a weight at optimizer step `step`."""
        return self._weight(step) > 0

    def most(self, groups_per_step: int) -> int:
        """Answers in one step: the share of its groups, rounded up."""
        return ceil(self._share * groups_per_step)

    def turn(self) -> bool:
        """Called for each prompt as it is admitted: whether the teacher is to answer it.

        Every (1 / share)th in order of admission, while the next step that starts could train the
        answer."""
        before, self._admitted = self._admitted, self._admitted + 1
        mine = floor(self._admitted * self._share) > floor(before * self._share) and self.teaches(
            self.version() + 1
        )
        self._requested += mine
        return mine

    async def answer(self, prompt: Prompt, lost: Callable[[str], None]) -> tuple[GroupMeta, Ref]:
        """From the generator with the fewest prompts; `lost` is told why one went with it."""
        return await self._generators.ask(lambda generator: generator.generate(prompt), lost=lost)

    def refuses(self, ready: Ready) -> str:
        """Why a verified answer is not trained; empty where it may be."""
        (verdict,), (truncated,) = ready.verdicts, ready.meta.truncated
        if not verdict.correct:
            return "teacher_unknown" if verdict.correct is None else "teacher_wrong"
        return "" if self._keeps_truncated or not truncated else "teacher_truncated"

    def row(self, step: int, batch: list[Ready], dropped: Counter[str]) -> dict[str, float]:
        """What optimizer step `step`, which trained `batch`, adds to its row of metrics; counts are
        totals so far."""
        taught = sum(ready.prompt.taught for ready in batch)
        self._trained += taught
        return {"taught": taught, "taught_weight": self._weight(step), **self.counts(dropped)}

    def counts(self, dropped: Counter[str]) -> dict[str, int]:
        """How many prompts the teacher was given, and what became of its answers."""
        causes = {f"dropped_{cause}": dropped[cause] for cause in CAUSES}
        return {"taught_requested": self._requested, "taught_trained": self._trained, **causes}
