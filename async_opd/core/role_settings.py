"""What each role is built with in its own process, beside its sections of the config."""

from collections.abc import Mapping
from typing import Literal

from msgspec import field

from async_opd.core.lora import LoraConfig
from async_opd.core.message import Struct
from async_opd.core.vocabulary import Ids


class GeneratorSettings(Struct, frozen=True):
    """What a generator is built with, beside its section of the config. Made by the runtime;
    consumed by a generator."""

    name: str  # what errors call it
    model: str
    eos_ids: tuple[int, ...]  # they end a response and are part of it
    max_prompt_tokens: int
    vocabulary: Ids  # of the tokenizer: no other is sampled, and log-probs are over these
    backend: str  # of weight updates
    seed: int  # engines of one run differ in it
    as_teacher: bool = False  # prompts are sampled from as their teacher reads them
    # of `eos_ids` those of rollout.stop, and its texts, which end one as well
    stops: tuple[int | str, ...] = ()
    # ends of the teacher's that its answers have in the place of the student's, and those
    ends_as: tuple[tuple[int, int], ...] = ()
    keeps_kv: bool = False  # through an update of the weights: running contexts are not recomputed
    trust_remote_code: bool = False
    lora: LoraConfig | None = None  # of the adapter that an update brings; None: it brings weights


class ScorerSettings(Struct, frozen=True):
    """What a teacher, or the reference, is built with, beside its section of the config. Made by
    the runtime; consumed by a teacher."""

    name: str  # what errors call it
    temperature: float
    # the student's, in this model's ids: candidates and answers of its own are of these
    vocabulary: Ids
    longest: int  # tokens of a sequence at most
    eos_ids: tuple[int, ...]  # they end a response of its own
    max_new_tokens: int  # of a response of its own
    as_student: bool = False  # it reads a prompt as the student does, whatever the teacher's is
    whole: Ids | None = (
        None  # of its own tokenizer: log-probs are over these; None: all of its head
    )
    stops: tuple[str, ...] = ()  # texts that end a response of its own as well
    # its ends and the student's that they are read as: where one is asked for the other is read
    ends_as: tuple[tuple[int, int], ...] = ()
    trust_remote_code: bool = False
    section: str = "teacher"  # of the config


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
    vocabulary: Ids | None = None  # ids that log-probs are over; None: all of the head
    train_stop: bool = True  # the tokens of what stands in rollout.stop
    record_every_steps: int = 0  # rank 0 returns a few trajectories with each of these; 0: never
    trust_remote_code: bool = False
    lora: LoraConfig | None = None  # None: every weight is trained
    # scorers that are the student's frozen base: teachers by `Prompt.teacher`, and the reference
    teachers: Mapping[str, ScorerSettings] = field(default_factory=dict[str, ScorerSettings])
    reference: ScorerSettings | None = None
    sends_adapter: bool = False  # alone; false: the weights that it changes, with it merged
