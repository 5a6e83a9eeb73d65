"""What each role is built with in its own process, beside its sections of the config."""

from typing import Literal

from async_opd.core.message import Struct


class GeneratorSettings(Struct, frozen=True):
    """What a generator is built with, beside its section of the config. Made by the runtime;
    consumed by a generator."""

    name: str  # what errors call it
    model: str
    eos_ids: tuple[int, ...]  # they end a response and are part of it
    max_prompt_tokens: int
    vocabulary: int  # of the tokenizer: ids from there on are padding, and never candidates
    backend: str  # of weight updates
    seed: int  # engines of one run differ in it
    as_teacher: bool = False  # prompts are sampled from as their teacher reads them
    trust_remote_code: bool = False


class ScorerSettings(Struct, frozen=True):
    """What a teacher, or the reference, is built with, beside its section of the config. Made by
    the runtime; consumed by a teacher."""

    name: str  # what errors call it
    temperature: float
    vocabulary: int  # of the tokenizer: ids from there on are padding, and never candidates
    longest: int  # tokens of a sequence at most
    eos_ids: tuple[int, ...]  # they end a response of its own
    max_new_tokens: int  # of a response of its own
    as_student: bool = False  # it reads a prompt as the student does, whatever the teacher's is
    trust_remote_code: bool = False


class LearnerSettings(Struct, frozen=True):
    """What every rank of the learner is built with, beside its sections of the config. Made by the
    runtime; consumed by the learner."""

    model: str
    temperature: float
    steps: int
    max_lag_steps: int
    stale: Literal["mask", "drop"]
    truncated: Literal["train", "mask", "drop"]
    max_new_tokens: int
    seed: int
    backend: str  # of weight updates
    bucket_bytes: int  # of weights that are gathered and sent at once
    sync_s: float  # within which the members of a weight group answer one another
    timeout_s: float  # within which the ranks do
    record_every_steps: int = 0  # rank 0 returns a few trajectories with each of these; 0: never
    trust_remote_code: bool = False
