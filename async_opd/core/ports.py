"""What the main loop needs of each role. `runtime/remote_roles.py` implements these over Ray; tests
implement them in a few lines.

A `Ref` stands for data that stays with the actors: an object reference under Ray, the object itself
in a test. The driver passes refs on and never looks inside.
"""

from typing import Any, Protocol

import numpy as np

from async_opd.core.wire import GroupMeta, Prompt, Rollout, Said, Sampling, StepResult, Verdict

Ref = Any


class Generator(Protocol):
    """Samples groups under weights that are replaced in flight."""

    async def generate(self, prompt: Prompt) -> tuple[GroupMeta, Ref]: ...
    async def respond(self, prompt: Prompt, sampling: Sampling) -> tuple[GroupMeta, Ref]: ...
    async def probe(self) -> tuple[np.ndarray, Rollout]: ...
    async def join_group(self, init_info: dict) -> None: ...
    async def update(self, version: int, update_info: dict, oldest: int) -> None: ...
    async def resume(self) -> None: ...
    async def check_health(self) -> None: ...
    def kill(self) -> None: ...


class Teacher(Protocol):
    """Scores a group; the scores stay where they are made. The reference is one too, which is only
    asked for them."""

    async def score(self, group: Ref) -> Ref: ...
    async def greedy(self, prompts: list[np.ndarray]) -> list[np.ndarray]: ...
    async def load(self, folder: str) -> None: ...
    async def save(self, file: str) -> None: ...
    async def restore(self, file: str) -> None: ...
    async def check_health(self) -> None: ...
    def kill(self) -> None: ...


class Verifier(Protocol):
    """Decides each response of a group; for an evaluation it tells what they say."""

    async def check(self, group: Ref) -> tuple[Verdict, ...]: ...
    async def check_response(self, id: str, ids: np.ndarray, answer: str) -> Verdict: ...
    async def said(self, group: Ref, verdicts: tuple[Verdict, ...]) -> tuple[Said, ...]: ...
    async def check_health(self) -> None: ...
    def kill(self) -> None: ...


class Learner(Protocol):
    """Holds the live student over all its ranks."""

    async def step(self, groups: list["Ready"]) -> StepResult: ...
    async def open_group(self, generators: int) -> list[dict]: ...
    async def join_group(self, generators: int) -> None: ...
    async def update_info(self) -> dict: ...
    async def send_weights(self) -> None: ...
    async def logprobs(self, prompt_ids: np.ndarray, response_ids: np.ndarray) -> np.ndarray: ...
    async def save(self, folder: str) -> None: ...
    async def save_state(self, folder: str) -> None: ...
    async def load_state(self, folder: str) -> None: ...


class Ready:
    """A scored and verified group in the queue: metadata the driver may read, and refs it may only
    pass on.

    What the teacher answered itself (`prompt.taught`) has no scores."""

    __slots__ = (
        "group",
        "meta",
        "prompt",
        "reference",
        "samples",
        "scores",
        "since",
        "ticket",
        "verdicts",
    )

    def __init__(
        self,
        ticket: int,
        prompt: Prompt,
        meta: GroupMeta,
        group: Ref,
        scores: Ref | None,
        verdicts: tuple[Verdict, ...],
        samples: tuple[int, ...],
        reference: Ref | None = None,
        since: int | None = None,
    ):
        self.ticket = ticket  # order of admission; names the slot
        self.prompt = prompt
        self.meta = meta
        self.group = group
        self.scores = scores
        self.verdicts = verdicts
        self.samples = samples  # which rollouts of the group are trained
        self.reference = reference  # scores of the reference, where the objective needs one
        # version that gives its place in the queue
        self.since = meta.oldest if since is None else since
