"""What becomes of groups, and when so many come to nothing that a run ends."""

from collections import Counter
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager

from async_opd.config.schema import Config
from async_opd.core.errors import (
    ActorLost,
    AsyncOpdError,
    Lethal,
    OverAge,
    TooManyDropped,
    first_line,
)
from async_opd.core.events import EventSink
from async_opd.core.ports import ScoredGroup
from async_opd.core.wire import Prompt, StepResult, Verdict, trained_tokens
from async_opd.driver.ledger import Ledger
from async_opd.roles.verifier.worker import RAISED

STEPS = 2  # whose groups are looked at
STUDENT, TEACHER = "student", "teacher"  # who answers a prompt
LONGEST = 100  # characters of an id, in a message


class GroupFailed(Exception):
    """Why a group cannot be trained, and by whose doing."""

    def __init__(self, role: str, why: str, *, lethal: bool = False):
        """`lethal`: it ends whom it is asked of, and nobody is asked again."""
        super().__init__(f"{role}: {why}")
        self.role = role
        self.why = why
        self.lethal = lethal


@contextmanager
def blamed(role: str) -> Generator[None]:
    """Raise the errors that cost a group, those that have `role` gone or the group too old not
    among them, as GroupFailed."""
    try:
        yield
    except (ActorLost, OverAge):
        raise
    except AsyncOpdError as e:
        raise GroupFailed(role, first_line(e), lethal=isinstance(e, Lethal)) from e


class Undecided:
    """Tells of the first response on which the check raised an error, as for a reference that it
    cannot read, and of the first by each other kind of error."""

    def __init__(self, emit: EventSink):
        self._emit = emit
        self._kinds: set[str] = set()

    def hear(self, verdicts: Iterable[Verdict]) -> None:
        """Note verdicts."""
        for verdict in verdicts:
            kind = verdict.cause.removeprefix(RAISED).partition(":")[0]
            if verdict.cause.startswith(RAISED) and kind not in self._kinds:
                self._kinds.add(kind)
                why = f"{verdict.id[:LONGEST]}: {verdict.cause}; further ones are counted"
                self._emit("not decided", "verifier", why)


class Outcomes:
    """Looks at what became of the last STEPS steps' worth of groups, of one that is issued again at
    its last attempt. TooManyDropped is raised

    - where more in a row failed than may be outstanding, of the student's groups or of the
      teacher's answers, or a larger share of all than run.max_failed_share, in whatever role
    - where all of them came to nothing, though not all failed
    - where as many steps in a row kept no token, whatever left them out

    The first failure in each role is an event, and so are truncated or stale groups above the
    share.
    """

    def __init__(self, config: Config, slots: int, ledger: Ledger, emit: EventSink):
        """At most `slots` groups are outstanding."""
        self._most = STEPS * config.groups_per_step
        self._slots = slots
        self._share = config.run.max_failed_share
        self.undecided = Undecided(emit)
        self._limits = {  # by a cause that is nobody's failure, the setting that makes it one
            "truncated": f"rollout.max_new_tokens = {config.rollout.max_new_tokens} cuts them",
            "stale": f"older than run.max_lag_steps = {config.run.max_lag_steps} allows",
        }
        self._ledger = ledger
        self._emit = emit
        # of the last prompts: who failed, or one of the limits; "" for what can be trained
        self._ended: dict[str, str] = {}
        # failed, by who answers and by role
        self._in_a_row: dict[str, Counter[str]] = {STUDENT: Counter(), TEACHER: Counter()}
        self._announced: set[str] = set()  # roles, and causes that are above the share
        self._rollouts = 0  # that failed alone, in all
        self._without_tokens = 0  # steps that kept none
        self._empty = 0  # of them, the last in a row

    def scored(self, prompt: Prompt, *, cut: bool, by: str = STUDENT) -> None:
        """Note a group that is to be trained, or that only seems so: a `cut` one has no token in
        the loss."""
        if self._empty >= STEPS:
            limits = (*self._limits.values(), "rollout.train_stop = false leaves stops out")
            raise TooManyDropped(
                f"the last {self._empty} steps kept no token to train: {', or '.join(limits)}"
            )
        self._in_a_row[by].clear()
        self._note(prompt, "truncated" if cut else "")

    def dropped(self, prompt: Prompt, cause: str) -> None:
        """Note a group that is not trained, though nothing failed."""
        if cause in self._limits:
            self._note(prompt, cause)

    def refused(self) -> None:
        """Note an answer of the teacher's that came, and is not trained."""
        self._in_a_row[TEACHER].clear()

    def failed(self, prompt: Prompt, failure: GroupFailed, *, by: str = STUDENT) -> None:
        """Note a group that failed."""
        self._announce(failure.role, f"{failure.why}; the group is dropped")
        in_a_row = self._in_a_row[by]
        in_a_row[failure.role] += 1
        causes = self._note(prompt, failure.role)
        if in_a_row.total() > self._slots:
            raise TooManyDropped(
                f"{in_a_row.total()} groups in a row failed ({_by(in_a_row)}), more than the"
                f" {self._slots} that may be outstanding; the last: {failure}"
            )
        failed = Counter({role: count for role, count in causes.items() if self._is_role(role)})
        if failed.total() > self._share * self._most:
            raise TooManyDropped(
                f"{failed.total()} of the last {self._most} groups failed ({_by(failed)}), above"
                f" run.max_failed_share = {self._share:g}; the last: {failure}"
            )

    def lost(self, prompt: Prompt, sample: int, failure: GroupFailed) -> None:
        """Note a rollout that failed, and without which its group goes on."""
        self._rollouts += 1
        self._ledger.failed(prompt.id, sample, failure.role)
        self._announce(failure.role, f"{failure.why}; its group goes on without it")

    def unscored(self, batch: Sequence[ScoredGroup], result: StepResult) -> None:
        """Note what the learner could not score of `batch`, and left out of its step."""
        prompts = {group.prompt.id: group.prompt for group in batch}
        for each in result.unscored:
            self.lost(prompts[each.id], each.sample, GroupFailed(each.role, each.why))

    def trained(self, batch: Sequence[ScoredGroup], result: StepResult) -> None:
        """Note a step of `batch`; a group of which the learner could score nothing has failed."""
        for group in batch:
            left_out = [each for each in result.unscored if each.id == group.prompt.id]
            if len(left_out) == len(group.samples):
                self.failed(group.prompt, GroupFailed(left_out[0].role, left_out[0].why))
        empty = not trained_tokens(result.metrics)
        self._without_tokens += empty
        self._empty = self._empty + 1 if empty else 0

    @property
    def counts(self) -> dict[str, int]:
        """Counts of the whole run."""
        return {
            "rollouts_failed": self._rollouts,
            "steps_without_tokens": self._without_tokens,
        }

    def restore(self, counts: Mapping[str, int]) -> None:
        """Count on from `counts`; from nothing, of a checkpoint that has none."""
        self._rollouts = counts.get("rollouts_failed", 0)
        self._without_tokens = counts.get("steps_without_tokens", 0)

    def _announce(self, role: str, why: str) -> None:
        if role not in self._announced:
            self._announced.add(role)
            self._emit("failed", role, f"{why}; further ones are counted")

    def _note(self, prompt: Prompt, cause: str) -> Counter[str]:
        """How many of the last groups ended in each way."""
        self._ended.pop(prompt.id, None)
        self._ended[prompt.id] = cause
        if len(self._ended) > self._most:
            del self._ended[next(iter(self._ended))]
        causes = Counter(self._ended.values())
        for name, limit in self._limits.items():
            if causes[name] <= self._share * self._most:
                self._announced.discard(name)
            elif name not in self._announced:
                self._announced.add(name)
                self._emit(name, "groups", f"{causes[name]} of the last {self._most}; {limit}")
        limits = [limit for name, limit in self._limits.items() if causes[name]]
        if len(self._ended) == self._most and not causes[""] and limits:
            raise TooManyDropped(
                f"of the last {self._most} groups none is left to train ({_by(causes)}):"
                f" {', '.join(limits)}"
            )
        return causes

    def _is_role(self, cause: str) -> bool:
        return bool(cause) and cause not in self._limits


def verdicts(batch: Sequence[ScoredGroup]) -> dict[str, float | int | None]:
    """What a row says of the verdicts on the student's own rollouts."""
    rewards = [verdict.reward for group in batch for verdict in group.student_verdicts]
    count, unknown = len(rewards), rewards.count(None)
    return {
        "accuracy": sum(reward or 0.0 for reward in rewards) / count if count else None,
        "verdicts_unknown": unknown,
        "verdicts_known": 1 - unknown / count if count else None,
    }


def _by(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())
