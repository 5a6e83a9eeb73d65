"""Settings of data and rollouts."""

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct
from msgspec.structs import replace

from async_opd.core.precision import Dtype

# Of `datasets`, by a file's ending.
FILE_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


# Settings that a source may have of its own; what it lacks is that of [data].
OWN = ("subset", "split", "prompt", "answer", "id", "teacher", "solution")


class SourceConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One of several sets that a run draws its prompts from. Absent: as [data] has it."""

    path: str  # as data.path
    weight: Annotated[float, Meta(gt=0)] = 1.0  # its share of the prompts is weight / sum of all
    subset: str | None = None
    split: str | None = None
    prompt: str | None = None  # columns
    answer: str | None = None
    id: str | None = None
    teacher: str | None = None
    solution: str | None = None


class FilterConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which prompts are not handed out again: those at which the student's last tries all came out
    alike. A try is a verdict on a rollout of its own that was trained; unknown is none."""

    tries: Annotated[int, Meta(ge=1, le=127)]  # the last of a prompt's, over all epochs
    drop: Literal["always_right", "always_wrong", "both"] = "both"


class DataConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Any dataset that `datasets` loads: a hub id, a folder, or jsonl/parquet files; or several."""

    # hub id, folder, or one file ending in .jsonl, .json or .parquet; absent: [data.sources.NAME]
    path: str = ""
    sources: dict[str, SourceConfig] = {}  # several sets, by names that prompts' ids begin with
    subset: str | None = None  # the dataset's own configuration, such as "main" of openai/gsm8k
    split: str = "train"
    prompt: str = "prompt"  # column: a string, or a list of {"role", "content"} messages
    answer: str = "answer"  # column: the reference answer
    id: str | None = None  # column naming the row; absent: its position
    # Column naming the teacher of the row, with sections [teachers.NAME].
    teacher: str | None = None
    solution: str | None = None  # column: a worked solution, for teachers with a context
    chat_template: bool = False  # render the prompt by the model's chat template
    template_args: dict[str, Any] = {}  # passed to the template, such as enable_thinking
    max_prompt_tokens: Annotated[int, Meta(ge=1)] = 1024
    # A longer one stops the run, or is counted and left out.
    long_prompt: Literal["error", "skip"] = "error"
    # Of another kind than its length: a row that cannot be used stops the run before it starts (one
    # of a stream when it is read), or is counted and left out.
    bad_rows: Literal["error", "skip"] = "error"
    epochs: Annotated[int, Meta(ge=1)] | None = None  # absent: as many as the steps need
    streaming: bool = False
    shuffle_buffer: Annotated[int, Meta(ge=1)] = 10_000  # rows, for streaming sets only
    # Absent: every prompt comes in every epoch.
    filter: FilterConfig | None = None

    @property
    def sets(self) -> dict[str, "DataConfig"]:
        """Each set as one alone, by the setting that names it."""
        if not self.sources:
            return {"data.path": self}
        return {source_key(name): self.of(source) for name, source in self.sources.items()}

    def columns(self, setting: str) -> dict[str, str | None]:
        """The column that each set has for `setting`, by the setting's whole name."""
        return {
            f"{key.removesuffix('path')}{setting}": getattr(data, setting)
            for key, data in self.sets.items()
        }

    def of(self, source: SourceConfig) -> "DataConfig":
        """Make the settings of one of the sources as those of a set alone."""
        settings = {name: getattr(source, name) for name in OWN}
        named = {name: value for name, value in settings.items() if value is not None}
        return replace(self, path=source.path, sources={}, **named)


def source_key(name: str) -> str:
    """Name the setting that names the set of the source `name`."""
    return f"data.sources.{name}.path"


class EngineConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The generators, whatever is sampled."""

    generators: Annotated[int, Meta(ge=1)] = 1
    concurrency: Annotated[int, Meta(ge=1)] = 256  # sequences one engine runs at once
    # Absent: bfloat16 on GPUs, float32 on CPUs.
    dtype: Dtype | None = None
    # Neither torch.compile nor CUDA graphs: starts sooner, samples more slowly.
    enforce_eager: bool = False
    tensor_parallel_size: Annotated[int, Meta(ge=1)] = 1
    memory_gib: Annotated[float, Meta(gt=0)] = 1.0  # KV cache of one engine on CPU
    gpu_memory_utilization: Annotated[float, Meta(gt=0, le=1)] = 0.85  # share of a GPU's memory
    # Ids and texts that end a response besides the model's own end tokens, and are part of it. An
    # added token is its id; any other text ends it with the token that completes it.
    stop: tuple[Annotated[int, Meta(ge=0)] | Annotated[str, Meta(min_length=1)], ...] = ()
    # Passed to vLLM's AsyncEngineArgs, checked against them: such as max_num_batched_tokens.
    engine: dict[str, Any] = {}


class RolloutConfig(EngineConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How responses are sampled. Temperature applies to student, behaviour and teacher alike."""

    max_new_tokens: Annotated[int, Meta(ge=1)]
    samples_per_prompt: Annotated[int, Meta(ge=1)] = 1
    temperature: Annotated[float, Meta(gt=0)] = 1.0
    # What becomes of a rollout cut by max_new_tokens.
    truncated: Literal["train", "mask", "drop"] = "train"
    train_stop: bool = True  # false: the tokens of what stands in `stop` leave the loss
