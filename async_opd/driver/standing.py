"""What a pool remembers of a member, and of a request on its way through the members."""

from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

from async_opd.telemetry.spans import Of

BACKOFF_S = 0.1  # after a refusal, then twice as long each
MAX_BACKOFF_S = 60.0
MAX_LOSSES = 2  # members that a request may have been lost with before it is asked for alone

R = TypeVar("R")


class Standing:
    """How a member has answered of late. One that refuses is left alone for a while, longer each
    time; what it had been sent before is one refusal with the first of them."""

    def __init__(self) -> None:
        self.refusals = 0  # in a row
        self.not_before = 0.0  # when it may be asked again, on the loop's clock
        self.faults = 0  # in a row: what it failed, and another did not
        self._late = 0  # calls, since it last said anything …
        self._heard = 0.0  # … which was then
        self.answers = 0  # so far, with nothing wrong in them
        self.blameless = False  # it was retired, and nothing that it had in flight is suspected

    def refused(self, sent: float, now: float) -> None:
        """Note a refusal of what was `sent` then."""
        if sent >= self.not_before:
            self.not_before = now + min(BACKOFF_S * 2 ** min(self.refusals, 30), MAX_BACKOFF_S)
            self.refusals += 1

    def heard(self, now: float) -> None:
        """Note an answer of any kind."""
        self._late, self._heard = 0, now

    def unheard(self, sent: float) -> int:
        """Note that what was `sent` then is late; returns how many are so far, while there was no
        answer to anything."""
        self._late += sent >= self._heard
        return self._late

    def answered(self) -> None:
        """Note an answer with nothing wrong in it."""
        self.refusals = self.faults = 0
        self.not_before = 0.0
        self.answers += 1


class Failure(NamedTuple):
    """What a member failed of a request."""

    parts: float  # that failed; infinitely many where it has refused
    why: str
    answers: int  # of that member before


@dataclass(eq=False)
class Request(Generic[R]):
    """What one caller of a pool wants, and what became of it at the members of type R."""

    of: Of
    load: int
    asked: set[R] = field(default_factory=set[Any])
    member: R | None = None  # where it counts
    alone: bool = False  # it has one for itself, or waits for it to be idle …
    reserved: set[R] = field(default_factory=set[Any])  # … and for that nobody else is asked there
    tries: int = 0  # that came to an end while the member lived
    failures: dict[R, Failure] = field(default_factory=dict[Any, Any])
    lost_with: set[R] = field(default_factory=set[Any])  # it may be what has ended them

    @property
    def is_suspect(self) -> bool:
        """Whether it is asked for with nothing beside it."""
        return len(self.lost_with) >= MAX_LOSSES
