"""Which records of a ledger are live: a run that goes back to a checkpoint makes void what came
after it."""

from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path

from async_opd.driver import ledger


class Timeline:
    """Which lines are live. A resume makes void what lies between its checkpoint and itself."""

    def __init__(self, path: Path, discrepancies: list[str]):
        """Read the file once; `discrepancies` takes what is wrong with it."""
        self._path = path
        self._discrepancies = discrepancies
        self.void: list[tuple[int, int]] = []  # [first line, line of the resume)
        self.resumed_at: list[int] = []
        self.highest = 0  # step, void ones too
        self._lines = 0
        self._marks = [(0, 0)]  # step and line of the live checkpoints, in their order
        self._dead: set[int] = set()  # steps of the void ones
        expected = 1
        for _, record in ledger.records(path):
            self._lines += 1
            if record.n > expected:
                self._discrepancies.append(
                    f"line {self._lines}: records {expected} to {record.n - 1} are missing"
                    " before it"
                )
            elif record.n < expected:
                self._discrepancies.append(
                    f"line {self._lines}: record {record.n} stands behind record {expected - 1}"
                )
            expected = record.n + 1
            match record:
                case ledger.Trained():
                    self.highest = max(self.highest, record.step)
                case ledger.Checkpoint():
                    self._marks.append((record.step, self._lines))
                case ledger.Resumed():
                    self._resume(record.step)

    def live(self) -> Iterator[tuple[int, ledger.Record]]:
        """Read the live records with their lines, as far as the file went when it was first
        read."""
        spans = iter([*self.void, (self._lines + 1, None)])
        first, end = next(spans)
        for line, (_, record) in enumerate(ledger.records(self._path), 1):
            if line == end:
                first, end = next(spans)
            if line < first:
                yield line, record
            elif end is None:
                return

    def newest(self, checkpoints: list[Path]) -> dict[int, Path]:
        """Find the newest of `checkpoints`, given newest first, that is not void, by its line."""
        lines = dict(self._marks)
        for folder in checkpoints:
            step = int(folder.name)
            if step in lines:
                return {lines[step]: folder}
            if step not in self._dead:
                self._discrepancies.append(
                    f"{folder}: complete, but the ledger has no checkpoint of step {step}"
                )
        return {}

    def _resume(self, step: int) -> None:
        self.resumed_at.append(step)
        kept = max(
            (count for count, (marked, _) in enumerate(self._marks, 1) if marked == step),
            default=None,
        )
        if kept is None:
            self._discrepancies.append(
                f"line {self._lines}: resumed at step {step}, of which the ledger has no checkpoint"
            )
            return
        self._dead |= {past for past, _ in self._marks[kept:]}
        del self._marks[kept:]
        first = self._marks[-1][1] + 1
        del self.void[bisect_right(self.void, (first,)) :]  # they lie within
        if first < self._lines:
            self.void.append((first, self._lines))
