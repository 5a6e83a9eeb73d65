"""What the driver needs of each role. `runtime.remote_role` and `runtime.remote_learner` have these
calls made by actors; tests implement them in a few lines.

A `Ref` stands for data that stays with the actors: an object reference under Ray, the object itself
in a test. The driver passes references on and never looks inside.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

from async_opd.core.weights import WeightGroup, WeightLayout
from async_opd.core.wire import (
    Ballot,
    Floats,
    GroupMeta,
    Ints,
    Prompt,
    Rollout,
    Sampling,
    StepResult,
    Verdict,
)

Ref = Any
F = TypeVar("F", bound=Callable[..., Any])


Timeout = Literal["generate", "score", "step", "sync", "collective"]


@dataclass(frozen=True)
class Remote:
    """How a call of a role travels to the actor that plays it."""

    within: Timeout  # which of the config's bounds it
    refs: int = 0  # the last results that stay where they are made
    batched: bool = False  # calls of one moment travel together, each with one argument
    queued: bool = False  # the role takes such calls up in their order: `core.line` bounds them


def remote(
    within: Timeout, refs: int = 0, batched: bool = False, queued: bool = False
) -> Callable[[F], F]:
    """Declare a method of a port to be a call of an actor's."""

    def declare(method: F) -> F:
        method.__dict__["remote"] = Remote(within, refs, batched, queued)
        return method

    return declare


def declared(port: type) -> dict[str, Remote]:
    """The calls that `port` declares, by name."""
    methods = vars(port).items()
    return {name: method.remote for name, method in methods if hasattr(method, "remote")}


class Member(Protocol):
    """What a pool needs of a role. A look at its health takes no longer than its port allows."""

    async def check_health(self) -> None: ...
    def kill(self) -> None: ...


class Generator(Member, Protocol):
    """Samples groups under weights that are replaced in flight."""

    @remote("generate", refs=1, queued=True)
    async def generate(self, prompt: Prompt) -> tuple[GroupMeta, Ref]: ...
    @remote("generate", refs=1, queued=True)
    async def respond(self, prompt: Prompt, sampling: Sampling) -> tuple[GroupMeta, Ref]: ...
    @remote("generate")
    async def probe(self, prompt: Ints | None = None, tokens: int = 0) -> tuple[Ints, Rollout]: ...
    @remote("collective")
    async def join_group(self, group: WeightGroup) -> None: ...
    @remote("collective")
    async def update(self, version: int, layout: WeightLayout, oldest: int) -> None: ...
    @remote("sync")
    async def resume(self, expected: int) -> None: ...


class Teacher(Member, Protocol):
    """Scores a group; the scores stay where they are made, and of each rollout comes why it has
    none, "" where it has. The reference is one too, which is only asked for them."""

    @remote("score", refs=1, batched=True, queued=True)
    async def score(self, group: Ref) -> tuple[tuple[str, ...], Ref]: ...
    @remote("score", queued=True)
    async def probe(self) -> Floats: ...
    @remote("generate", queued=True)
    async def greedy(self, *prompts: Ints) -> list[Ints]: ...
    @remote("step")
    async def load(self, folder: str) -> None: ...
    @remote("step")
    async def save(self, file: str) -> None: ...
    @remote("step")
    async def restore(self, file: str) -> None: ...


class Verifier(Member, Protocol):
    """Decides each response of a group; for an evaluation it tells what they say."""

    @remote("score", batched=True, queued=True)
    async def check(self, group: Ref) -> tuple[Verdict, ...]: ...
    @remote("score", queued=True)
    async def check_response(self, id: str, ids: Ints, answer: str) -> Verdict: ...
    @remote("score", queued=True)
    async def ballots(self, group: Ref, *verdicts: Verdict) -> tuple[Ballot, ...]: ...


class Learner(Protocol):
    """Holds the live student over all its ranks. What is declared here is called on each of them,
    as ZeRO-3 needs, and rank 0's result counts."""

    async def step(self, groups: Sequence["ScoredGroup"]) -> StepResult: ...
    async def open_group(self, generators: int) -> list[WeightGroup]: ...
    async def join_group(self, generators: int) -> None: ...
    async def leave_group(self) -> None: ...
    @remote("sync")
    async def weight_layout(self) -> WeightLayout: ...
    @remote("collective")
    async def send_weights(self) -> None: ...
    @remote("step")
    async def logprobs(self, *ids: Ints) -> Floats: ...
    @remote("step")
    async def save(self, folder: str) -> None: ...
    @remote("step")
    async def save_whole(self, folder: str) -> None: ...
    @remote("step")
    async def save_state(self, folder: str) -> None: ...
    @remote("step")
    async def load_state(self, folder: str) -> None: ...


# without comparison and text of its own: it holds arrays, and asyncio writes results out
@dataclass(frozen=True, kw_only=True, slots=True, repr=False, eq=False)
class ScoredGroup:
    """A scored and verified group in the queue: metadata the driver may read, and references it may
    only pass on."""

    ticket: int  # order of admission; names the slot
    prompt: Prompt
    meta: GroupMeta
    group: Ref
    scores: Ref | None  # None where the teacher has answered the prompt itself, or is the learner
    verdicts: tuple[Verdict, ...]
    samples: tuple[int, ...]  # which rollouts of the group are trained
    since: int  # version that gives its place in the queue
    reference: Ref | None = None  # scores of the reference, where the objective needs one
    from_teacher: bool = False  # the teacher has answered the prompt itself
    by_learner: bool = False  # the teacher is the learner, which scores what it trains

    @property
    def student_verdicts(self) -> tuple[Verdict, ...]:
        """Verdicts on the student's rollouts: the teacher's are right, or they would not be
        here."""
        return () if self.from_teacher else self.verdicts
