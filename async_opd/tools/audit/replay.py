"""The live records of a ledger, followed one by one: who is outstanding, and what breaks the
books."""

from array import array
from collections import Counter
from collections.abc import Iterator

import numpy as np

from async_opd.driver import ledger


class Replay:
    """Follows the live records, and notes in `discrepancies` what breaks the books."""

    def __init__(self, per_step: int, discrepancies: list[str]):
        self._per_step = per_step
        self._discrepancies = discrepancies
        self.attempts: dict[str, int] = {}  # of each outstanding prompt
        self._due: dict[str, None] = {}  # of them: to be handed out again since a resume, in order
        self.handed_out = array("q")  # hashes of ids
        # Each: an id that is not outstanding, hand-outs before, what the ledger says of it.
        self._strays: list[tuple[str, int, str]] = []
        self.step = self.trained = 0
        self.finished = False
        self.dropped = Counter()
        self.reissued = Counter()
        self.returned = Counter()
        self.failed = Counter()  # rollouts, by role

    def read(self, record: ledger.Record) -> None:
        """Follow one record."""
        if self.finished:
            self._discrepancies.append(f"record {record.n} stands behind the end of the run")
        match record:
            case ledger.Out():
                self._out(record.id)
            case ledger.Trained():
                self._train(record)
            case ledger.Dropped():
                self.dropped[record.cause] += 1
                self._due.pop(record.id, None)  # what no step is left for is not handed out again
                self._end(record.id, f"dropped ({record.cause})")
            case ledger.Reissued():
                self._reissue(record)
            case ledger.Failed():
                self.failed[record.role] += 1
                if record.id not in self.attempts:
                    self._stray(record.id, f"rollout {record.sample} failed ({record.role})")
            case ledger.Returned():
                self.returned[record.cause] += 1
                if record.id not in self.attempts:
                    self._stray(record.id, f"handed back ({record.cause})")
            case ledger.Checkpoint() if record.step != self.step:
                self._discrepancies.append(
                    f"a checkpoint of step {record.step} stands behind step {self.step}"
                )
            case ledger.Resumed():
                self.agrees(f"the resume at step {record.step}", record.outstanding)
                self.step = record.step
                self.attempts = dict.fromkeys(record.outstanding, 0)
                self._due = dict.fromkeys(record.outstanding)
            case ledger.Finished():
                self.finished = True

    def agrees(self, where: str, theirs: list[str]) -> None:
        """Hold what `where` says is outstanding against what is."""
        ours, known = list(self.attempts), set(theirs)
        self._discrepancies += [
            f"{id}: outstanding, but {where} does not know it" for id in ours if id not in known
        ]
        self._discrepancies += [
            f"{id}: not outstanding, but {where} says so"
            for id in theirs
            if id not in self.attempts
        ]
        if ours != theirs and sorted(ours) == sorted(theirs):
            self._discrepancies.append(f"{where} has what is outstanding in another order")

    def close(self, steps: int, again: Iterator[tuple[int, ledger.Record]]) -> None:
        """Note the end of the file; `again` are the records once more, read where an id has to be
        found."""
        if self.finished and self.step != steps:
            self._discrepancies.append(f"the run finished after step {self.step} of {steps}")
        if self.finished:
            self._discrepancies += [
                f"{id}: lost: handed out, neither trained nor dropped" for id in self.attempts
            ]
        hashes = np.asarray(self.handed_out)
        known = np.flatnonzero(np.isin(hashes, [hash(id) for id, _, _ in self._strays]))
        first = {int(hashes[place]): place for place in reversed(known)}
        self._discrepancies += [
            f"{id}: {what}, but it"
            f" {'had ended before' if first.get(hash(id), n) < n else 'was never handed out'}"
            for id, n, what in self._strays
        ]
        hashes = np.sort(hashes)
        twice = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
        if twice:
            ids = {
                record.id
                for _, record in again
                if type(record) is ledger.Out and hash(record.id) in twice
            }
            self._discrepancies += [
                f"{id}: handed out anew after it had ended" for id in sorted(ids)
            ]

    def _out(self, id: str) -> None:
        if id not in self._due:
            if id in self.attempts:
                self._discrepancies.append(f"{id}: handed out while it was outstanding")
            else:
                self.attempts[id] = 0
                self.handed_out.append(hash(id))
        while self._due:
            due = next(iter(self._due))
            del self._due[due]
            if due == id:
                return
            self._discrepancies.append(
                f"{due}: outstanding at the resume, but {id} was handed out before it"
            )

    def _train(self, record: ledger.Trained) -> None:
        if record.step != self.step + 1:
            self._discrepancies.append(f"step {record.step} follows step {self.step}")
        if len(record.ids) != self._per_step:
            self._discrepancies.append(
                f"step {record.step} has {len(record.ids)} groups, config.json says"
                f" {self._per_step}"
            )
        self.step = record.step
        self.trained += len(record.ids)
        for id in record.ids:
            self._end(id, f"trained at step {record.step}")

    def _reissue(self, record: ledger.Reissued) -> None:
        self.reissued[record.cause] += 1
        before = self.attempts.get(record.id)
        if before is None:
            self._stray(record.id, f"re-issued ({record.cause})")
            return
        # What the teacher did not answer is the student's first attempt.
        if record.attempt not in (before, before + 1):
            self._discrepancies.append(
                f"{record.id}: attempt {record.attempt} follows attempt {before}"
            )
        self.attempts[record.id] = record.attempt

    def _end(self, id: str, what: str) -> None:
        if self.attempts.pop(id, None) is None:
            self._stray(id, what)
        elif id in self._due:
            del self._due[id]
            self._discrepancies.append(f"{id}: {what} before it was handed out again")

    def _stray(self, id: str, what: str) -> None:
        self._strays.append((id, len(self.handed_out), what))
