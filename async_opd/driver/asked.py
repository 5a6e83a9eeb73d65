"""Who of one role gets the next call, and what becomes of it where the member refuses or dies."""

import asyncio
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Sequence
from operator import attrgetter
from typing import Any, Generic, TypeVar, TypeVarTuple

from async_opd.core.errors import (
    ActorLost,
    AsyncOpdError,
    CallFailed,
    Lethal,
    TimedOut,
    WireError,
    first_line,
)
from async_opd.core.events import EventSink
from async_opd.core.ports import Member
from async_opd.driver.replica import Replica
from async_opd.driver.standing import Failure, Request
from async_opd.telemetry.spans import Of

TRIES = 4  # of one request: the first, and three more, elsewhere if there is somebody
MAX_FAULTS = 5  # in a row, of a member where others have none
LOAD = attrgetter("load")
REFUSALS = (CallFailed, WireError, TimedOut)  # of a request, by a member that lives

M = TypeVar("M", bound=Member)
T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class Asked(ABC, Generic[M]):
    """Members that serve. Each call goes to the one with the least in flight, and what one refuses
    to another.

    A member that refuses is left alone for a while, longer each time, and gets one request at a
    time until it has answered again: being idle draws no load to it. One that goes on failing what
    others do not is retired, and one that is late with TRIES of them and answers nothing meanwhile.
    Late with one and sound otherwise is none of that.

    Whatever was in flight at a member that is lost may be what has ended it. A request that was
    lost with MAX_LOSSES of them is asked for alone, of a member that has nothing else meanwhile: it
    is lost again, and is what ends them, or it is no suspect any more.
    """

    def __init__(self, name: str, emit: EventSink):
        self.name = name
        self._emit = emit
        self.answered = 0.0  # when a member last did
        self._serving: dict[int, Replica[M]] = {}  # in order
        self._changed = asyncio.Event()  # who serves, or what one of them has in flight
        self._requests: set[Request[Replica[M]]] = set()
        self._lethal: dict[Of, str] = {}  # what ends members, in any epoch, and why that is known
        self._alone = 0  # requests that have a member for themselves, or wait for one to be idle
        self._reserved: set[Replica[M]] = set()  # for them
        self._wary: set[Replica[M]] = set()  # of members that have refused of late
        self._announced = False

    @abstractmethod
    def retire(self, replica: Replica[M], why: str, *, blameless: bool = False) -> None:
        """Give `replica` up: nothing more is asked of it, and another takes its place. `blameless`:
        nothing that it has in flight may be what has ended it. May be called again."""

    @abstractmethod
    def dismiss(self, replica: Replica[M], why: str) -> None:
        """Give up one that lives, and is `blameless`: at once, or, where it takes part in an update
        of weights, at the end of that."""

    @abstractmethod
    def refuse_if_empty(self) -> None:
        """Raises ActorLost when nobody is left and none can come."""

    async def ask(
        self,
        method: Callable[[M, *Ts], Coroutine[Any, Any, T]],
        *args: *Ts,
        of: Of = "",
        load: int = 1,
        unsound: Callable[[T], Sequence[str]] = lambda answer: (),
        lost: Callable[[str], None] = lambda why: None,
    ) -> T:
        """Call `method` of the member with the least in flight, while it counts for `load`. Waits
        while nobody may be asked.

        Another is asked when the member is lost meanwhile, after `lost` was told why; when it
        refuses; and, once, where `unsound` says what in its answer failed (it raises WireError for
        what is no answer): the better of the two is returned. Any other named error is the
        caller's. Raises ActorLost when nobody is left and none can come, CallFailed for what TRIES
        of them refuse, Lethal for what ends whom it is asked of."""
        if why := self._lethal.get(_row(of)):
            raise Lethal(why)
        request: Request[Replica[M]] = Request(of, load)
        self._requests.add(request)
        best: tuple[int, T] | None = None
        again = False
        clock = asyncio.get_running_loop().time
        try:
            while best is None or again:
                member, again = await self._placed(request), False
                sent = clock()
                try:
                    answer = await member.call(method, *args, of=of)
                    self.answered = clock()
                    failed = unsound(answer)
                except ActorLost as e:
                    self.retire(member, str(e))
                    lost(member.lost)
                    self._suspect(request, member)
                except REFUSALS as e:
                    if self._refused(request, member, e, sent) and best is None:
                        what = f"{method.__name__} {of}: refusal {request.tries}"
                        raise CallFailed(f"{what}: {first_line(e)}") from e
                except AsyncOpdError:
                    if best is None:
                        raise
                else:
                    self._answered(request, member, failed)
                    is_first = best is None and len(request.failures) == 1
                    again = bool(failed) and is_first and self._others(request)
                    if best is None or len(failed) < best[0]:
                        best = len(failed), answer
                self._leave(request)
            return best[1]
        finally:
            self._leave(request)
            self._requests.discard(request)

    async def _placed(self, request: Request[Replica[M]]) -> Replica[M]:
        """A member for `request`, which counts there, and has it for itself where it is a suspect,
        until `_leave`."""
        while request.is_suspect and not request.alone:  # another may be what ended them
            if self._alone < max(1, len(self._serving) - 1):  # one member is for the others
                request.alone = True
                self._alone += 1
            else:
                await self._change(None)
        member = await (self._emptied(request) if request.alone else self._least(request))
        request.asked.add(member)
        request.member = member
        member.load += request.load
        return member

    def _leave(self, request: Request[Replica[M]]) -> None:
        """`request` counts nowhere any more."""
        if request.member:
            request.member.load -= request.load
            request.member = None
        elif not request.alone:
            return
        if request.alone:
            request.alone = False
            self._alone -= 1
            self._reserved -= request.reserved
            request.reserved.clear()
        self._changed.set()

    async def _emptied(self, request: Request[Replica[M]]) -> Replica[M]:
        """The member with the least in flight, reserved for `request`, once it has nothing in
        flight."""
        while True:
            member = await self._least(Request("", 0))
            request.reserved.add(member)
            self._reserved.add(member)
            while member.load and not member.lost:
                await self._change(None)
            if not member.lost:
                return member

    async def _least(self, request: Request[Replica[M]]) -> Replica[M]:
        """The member that `request` goes to; waits while there is none that may be asked. Asked are
        first those that have not been asked for it, and last those that have refused and already
        try something."""
        if self._serving and not (request.asked or self._reserved or self._wary):
            return min(self._serving.values(), key=LOAD)
        clock = asyncio.get_running_loop().time
        while True:
            self.refuse_if_empty()
            self._wary.intersection_update(self._serving.values())
            members = [each for each in self._serving.values() if each not in self._reserved]
            now = clock()
            able = [each for each in members if each.standing.not_before <= now]
            fresh = [each for each in able if each not in request.asked]
            if able:
                return min(fresh or able, key=_draw)  # the first of several
            await self._change(min((each.standing.not_before for each in members), default=None))

    async def _change(self, until: float | None) -> None:
        """Wait until other members may be asked, or it is time to look again."""
        self._changed.clear()
        try:
            async with asyncio.timeout_at(until):
                await self._changed.wait()
        except TimeoutError:
            pass

    def _others(self, request: Request[Replica[M]]) -> bool:
        return any(each not in request.asked for each in self._serving.values())

    def _suspect(self, request: Request[Replica[M]], member: Replica[M]) -> None:
        """Note that `member` was lost with `request`. Raises Lethal where it had nothing else."""
        if member.standing.blameless:
            return
        request.lost_with.add(member)
        if request.alone:
            for other in self._requests - {request}:  # no need to suspect them of these
                other.lost_with -= request.lost_with
            count = len(request.lost_with)
            why = f"it ends whom it is asked of: {count} were lost with it, the last alone"
            why = f"{request.of}: {why}: {member.lost}"
            if request.of:
                self._lethal[_row(request.of)] = why
            raise Lethal(why)

    def _refused(
        self, request: Request[Replica[M]], member: Replica[M], error: AsyncOpdError, sent: float
    ) -> bool:
        """Note that `member` refuses `request`; returns whether nobody is asked any more."""
        request.tries += 1
        answers = member.standing.answers
        request.failures[member] = Failure(math.inf, first_line(error), answers)
        if not self._announced:
            self._announced = True
            self._emit("refused", member.name, f"{first_line(error)}; another is asked, if any")
        if isinstance(error, TimedOut):  # it may be slow, and has been left alone
            if member.standing.unheard(sent) >= TRIES:
                why = f"{first_line(error)}, nor to {TRIES - 1} others before"
                self.dismiss(member, why)
            return request.tries == TRIES
        member.standing.heard(asyncio.get_running_loop().time())
        member.standing.refused(sent, asyncio.get_running_loop().time())
        self._wary.add(member)
        known = member.standing.refusals >= TRIES and not self._others(request)
        return known or request.tries == TRIES

    def _answered(
        self, request: Request[Replica[M]], member: Replica[M], failed: Sequence[str]
    ) -> None:
        """Note an answer of `member`, and who failed where it did not."""
        request.lost_with.clear()
        member.standing.heard(self.answered)
        if not failed:
            member.standing.answered()
            self._wary.discard(member)
        for other, failure in request.failures.items():
            in_a_row = other.standing.answers == failure.answers
            if failure.parts > len(failed) and in_a_row and not other.lost:
                self._at_fault(other, failure.why)
        if failed:
            request.failures[member] = Failure(len(failed), failed[0], member.standing.answers)

    def _at_fault(self, member: Replica[M], why: str) -> None:
        standing, now = member.standing, asyncio.get_running_loop().time()
        standing.refused(now, now)
        self._wary.add(member)
        standing.faults += 1
        if standing.faults >= MAX_FAULTS and len(self._serving) > 1:
            why = f"{standing.faults} times in a row it failed what others did not, the last: {why}"
            self.dismiss(member, f"{member.name}: {why}")


def _draw(member: Replica[Any]) -> tuple[bool, int]:
    """What keeps load from `member`: it has refused and tries something, then what it has."""
    return bool(member.standing.refusals and member.load), member.load


def _row(of: Of) -> Of:
    """The row of the data that a prompt's id names, in whatever epoch."""
    return of.rpartition("@")[0] or of if isinstance(of, str) else of
