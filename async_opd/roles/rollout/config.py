"""Settings of data and rollouts."""

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from async_opd.core.precision import Dtype

# Of `datasets`, by a file's ending.
FILE_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


class DataConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Any dataset that `datasets` loads: a hub id, a folder, or jsonl/parquet files."""

    path: str  # hub id, folder, or one file ending in .jsonl, .json or .parquet
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
