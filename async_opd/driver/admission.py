"""Which prompt is handed out next, and what becomes of one whose group is not trained."""

from collections.abc import Callable, Iterator

import msgspec

from async_opd.core.errors import DataError
from async_opd.core.events import EventSink
from async_opd.core.wire import Prompt
from async_opd.driver.ledger import Ledger
from async_opd.driver.producer import Producer
from async_opd.driver.queue import Slots
from async_opd.driver.teacher_sampling import TeacherSampling


class Supply:
    """The prompts of a run, to where no more can be had: the data is used up, or a row cannot be
    used. What is outstanding then is trained first."""

    def __init__(self, prompts: Iterator[Prompt], slots: Slots, per_step: int, emit: EventSink):
        """`per_step` groups are a step's."""
        self.ended: DataError | None = None  # why there are no more
        self._prompts = prompts
        self._slots = slots
        self._per_step = per_step
        self._emit = emit

    def __iter__(self) -> Iterator[Prompt | None]:
        return self

    def __next__(self) -> Prompt | None:
        """The next prompt, or None while what is outstanding still fills a step. Raises DataError
        when it does not."""
        if self.ended is None:
            try:
                return next(self._prompts)
            except StopIteration:
                self.ended = DataError("data: its rows are used up")
            except DataError as e:
                self.ended = e
            self._emit("no more prompts", "data", f"{self.ended}; the outstanding are trained")
        if self._slots.untrained < self._per_step:
            raise self.ended
        return None


class Admission:
    """Keeps every slot in use: as soon as one is free the next prompt goes to the teacher, where it
    is its turn, or else to the student."""

    def __init__(
        self,
        prompts: Iterator[Prompt | None],
        needed: int,
        *,
        slots: Slots,
        ledger: Ledger,
        max_attempts: int,
        student: Producer,
        teacher: TeacherSampling | None = None,
        ahead: Callable[[int, int, Callable[[], None]], bool] = lambda needed, free, then: True,
    ):
        """`needed` groups are admitted in all, so that the last step leaves none behind; a finally
        dropped one is replaced while there are `prompts`. A prompt is issued `max_attempts` times
        at most. `ahead(needed, free, then)` has those to come be read beside everything else; where
        it says that the next one cannot be had yet, and slots are free, it calls `then` when it
        can."""
        self.needed = needed  # groups still to be admitted
        self._prompts = prompts
        self._slots = slots
        self._ledger = ledger
        self._max_attempts = max_attempts
        self._student = student
        self._teacher = teacher
        self._ahead = ahead

    def fill(self) -> None:
        """Hand out prompts while slots are free."""
        while (
            self._ahead(self.needed, self._slots.free, self.fill)
            and self.needed
            and self._slots.free
        ):
            if (prompt := next(self._prompts)) is None:
                return
            self._ledger.handed_out(prompt.id)
            self.needed -= 1
            ticket = self._slots.take()
            if not (self._teacher and self._teacher.answers(ticket, prompt)):
                self._student.start(ticket, prompt)

    def dropped(self, ticket: int, prompt: Prompt, cause: str) -> None:
        """Issue the prompt of a group that will not be trained again at the front, or drop it for
        good and give its slot to the next prompt. The teacher is asked once, then the student in
        its place; nobody again for what ends whom it is asked of."""
        answered = self._teacher is not None and self._teacher.is_done_with(ticket)
        attempt = prompt.attempt + (not answered)
        again = answered or prompt.id not in self._student.lethal
        if again and attempt < self._max_attempts:
            self._ledger.reissued(prompt.id, attempt, cause)
            self._student.start(ticket, msgspec.structs.replace(prompt, attempt=attempt))
        else:
            self._ledger.dropped(prompt.id, cause)
            self._slots.give_back(ticket)
            self.needed += 1
        self.fill()
