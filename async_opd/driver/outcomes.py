"""What becomes of groups, and when so many come to nothing that a run ends."""

from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

from async_opd.config.schema import Config
from async_opd.core.errors import ActorLost, AsyncOpdError, OverAge, TooManyDropped, first_line
from async_opd.core.events import EventSink
from async_opd.core.ports import ScoredGroup
from async_opd.core.wire import Prompt, StepResult, trained_tokens
from async_opd.driver.ledger import Ledger

STEPS = 2  # whose groups are looked at
K = TypeVar("K")


class GroupFailed(Exception):
    """Why a group cannot be trained, and by whose doing."""

    def __init__(self, role: str, why: str):
        super().__init__(f"{role}: {why}")
        self.role = role
        self.why = why


@contextmanager
def blamed(role: str) -> Generator[None]:
    """Raise the errors that cost a group, those that have `role` gone or the group too old not
    among them, as GroupFailed."""
    try:
        yield
    except (ActorLost, OverAge):
        raise
    except AsyncOpdError as e:
        raise GroupFailed(role, first_line(e)) from e


class Outcomes:
    """Looks at the last STEPS steps' worth of groups. TooManyDropped is raised

    - where more groups in a row failed than may be outstanding, or more than run.max_failed_share
      of the prompts (one that is issued again counts once), in whatever role
    - where every group was truncated or stale, so that nothing is left to train

    The first failure in each role is an event, and so are truncated or stale groups above the
    share.
    """

    def __init__(self, config: Config, slots: int, ledger: Ledger, emit: EventSink):
        """At most `slots` groups are outstanding."""
        self._most = STEPS * config.groups_per_step
        self._slots = slots
        self._share = config.run.max_failed_share
        self._limits = {  # by what is none's failure, the setting that makes it so
            "truncated": f"rollout.max_new_tokens = {config.rollout.max_new_tokens} cuts them",
            "stale": f"older than run.max_lag_steps = {config.run.max_lag_steps} allows",
        }
        self._ledger = ledger
        self._emit = emit
        self._failed: dict[str, str] = {}  # of the last prompts: the role, "" where none failed
        self._ended: dict[tuple[str, int], str] = {}  # of the last attempts: the cause, "" for none
        self._in_a_row: Counter[str] = Counter()  # failed, by role
        self._announced: set[str] = set()
        self._rollouts = 0  # that failed alone, in all
        self._without_tokens = 0  # steps that kept none

    def scored(self, prompt: Prompt, *, cut: bool) -> None:
        """Note a group that is to be trained, or that only seems so: a `cut` one has no token in
        the loss."""
        self._in_a_row.clear()
        _note(self._failed, prompt.id, "", self._most)
        self._note(prompt, "truncated" if cut else "")

    def dropped(self, prompt: Prompt, cause: str) -> None:
        """Note a group that is not trained, though nothing failed."""
        if cause in self._limits:
            _note(self._failed, prompt.id, "", self._most)
            self._note(prompt, cause)

    def failed(self, prompt: Prompt, failure: GroupFailed) -> None:
        """Note a group that failed."""
        role, last = failure.role, f"{failure}"
        self._announce(role, f"{failure.why}; the group is dropped")
        self._in_a_row[role] += 1
        _note(self._failed, prompt.id, role, self._most)
        roles = Counter(role for role in self._failed.values() if role)
        if self._in_a_row.total() > self._slots:
            raise TooManyDropped(
                f"{self._in_a_row.total()} groups in a row failed ({_by(self._in_a_row)}), more"
                f" than the {self._slots} that may be outstanding; the last: {last}"
            )
        if roles.total() > self._share * self._most:
            raise TooManyDropped(
                f"{roles.total()} of the last {self._most} groups failed ({_by(roles)}), above"
                f" run.max_failed_share = {self._share:g}; the last: {last}"
            )
        self._note(prompt, "failed")

    def lost(self, prompt: Prompt, sample: int, failure: GroupFailed) -> None:
        """Note a rollout that failed, and without which its group goes on."""
        self._rollouts += 1
        self._ledger.failed(prompt.id, sample, failure.role)
        self._announce(failure.role, f"{failure.why}; its group goes on without it")

    def trained(self, result: StepResult) -> None:
        """Note a step."""
        self._without_tokens += not trained_tokens(result.metrics)

    @property
    def counts(self) -> dict[str, int]:
        """Counts of the whole run."""
        return {
            "rollouts_failed": self._rollouts,
            "steps_without_tokens": self._without_tokens,
        }

    def restore(self, counts: Mapping[str, int]) -> None:
        """Count on from `counts`."""
        self._rollouts = counts["rollouts_failed"]
        self._without_tokens = counts["steps_without_tokens"]

    def _announce(self, role: str, why: str) -> None:
        if role not in self._announced:
            self._announced.add(role)
            self._emit("failed", role, f"{why}; further ones are counted")

    def _note(self, prompt: Prompt, cause: str) -> None:
        _note(self._ended, (prompt.id, prompt.attempt), cause, self._most)
        causes = Counter(self._ended.values())
        for name, limit in self._limits.items():
            if causes[name] <= self._share * self._most:
                self._announced.discard(name)
            elif name not in self._announced:
                self._announced.add(name)
                self._emit(name, "groups", f"{causes[name]} of the last {self._most}; {limit}")
        limits = [limit for name, limit in self._limits.items() if causes[name]]
        if causes.total() == self._most and not causes[""] and limits:
            raise TooManyDropped(
                f"of the last {self._most} groups none is left to train ({_by(causes)}):"
                f" {', '.join(limits)}"
            )


def verdicts(batch: Sequence[ScoredGroup]) -> dict[str, float | int | None]:
    """What a row says of the verdicts on the student's own rollouts."""
    correct = [verdict.correct for group in batch for verdict in group.student_verdicts]
    known = [one for one in correct if one is not None]
    accuracy = sum(known) / len(known) if known else None
    return {"accuracy": accuracy, "verdicts_unknown": len(correct) - len(known)}


def _note(last: dict[K, str], key: K, what: str, most: int) -> None:
    """Put `what` of `key` behind the others in `last`, which keeps `most` of them."""
    last.pop(key, None)
    last[key] = what
    while len(last) > most:
        del last[next(iter(last))]


def _by(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())
