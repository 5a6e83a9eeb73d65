"""Every actor a run starts with."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from async_opd.core.ports import Generator, Learner, Teacher, Verifier

# a new member of a pool, by the pool's name and the member's number, or the address of the server
# that it asks
Spawn = Callable[[str, int | str], Awaitable[Any]]


@dataclass(frozen=True, kw_only=True)
class Roles:
    """Every actor a run starts with, behind its port, and how others are started in their place."""

    generators: Sequence[Generator]
    # replicas by `Prompt.teacher`; in the place of a server's that does not answer yet is none
    teachers: Mapping[str, Sequence[Teacher | None]]
    references: Sequence[Teacher | None] = ()  # likewise, where the objective needs a reference
    verifier: Verifier
    learner: Learner
    # they hold the teacher, and answer prompts in the student's place
    teacher_generators: Sequence[Generator] = ()
    # generators and learner compute in float32, so that their log-probs agree to the last digits
    exact: bool = True
    spawn: Spawn | None = None  # absent: who is lost is not replaced
    # looks at the server at an address that is to be asked by a pool; raises ConfigError for one
    # that cannot serve
    look: Callable[[str, str], Awaitable[None]] | None = None
