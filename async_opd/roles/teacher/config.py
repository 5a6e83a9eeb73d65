"""Settings of what scores rollouts: teachers, and the reference."""

import re
from math import ceil
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from async_opd.core.precision import Dtype
from async_opd.core.urls import normal
from async_opd.maths import schedules

JINJA = re.compile(r"\{[{%#]")  # in a template, and in no name of a file


class ScorerConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`replicas` copies of one model, or the servers at `urls` that serve it already."""

    # "vllm" is for larger models: temperature 1, no entropy, and of a tail what its candidates
    # leave, no less than 1e-6. "server": likewise, by somebody else's vLLM servers. "learner", with
    # student.lora: the student's own base, in the learner's ranks, with no copy of it anywhere; of
    # what is set below, nothing has an effect.
    backend: Literal["transformers", "vllm", "server", "learner"] = "transformers"
    replicas: Annotated[int, Meta(ge=1)] = 1  # of a server: as many as `urls`
    # server: address of each, http://HOST:PORT or https://…
    urls: tuple[str, ...] = ()
    # server: name of the environment's variable, where the run starts, that holds their key
    key_env: str | None = None
    # Absent: bfloat16 on GPUs, float32 on CPUs. Of a server what it computes in, which says how far
    # the answers of two may differ; absent: bfloat16.
    dtype: Dtype | None = None
    # Of one forward, prompts included; vllm on CPU holds their logits.
    batch_tokens: Annotated[int, Meta(ge=1)] = 8192
    # transformers: longest a request waits for company; 0: take what is queued
    flush_s: Annotated[float, Meta(ge=0)] = 0.0
    # transformers: rows of [·, vocabulary] held at once; absent: by device
    head_chunk_rows: Annotated[int, Meta(ge=1)] | None = None
    tensor_parallel_size: Annotated[int, Meta(ge=1)] = 1  # vllm: GPUs of one replica
    memory_gib: Annotated[float, Meta(gt=0)] = 1.0  # vllm: KV cache of one engine on CPU
    # share of a GPU, of vllm; of any backend with run.share_gpu
    gpu_memory_utilization: Annotated[float, Meta(gt=0, le=1)] = 0.85
    # vllm: passed to its AsyncEngineArgs, checked against them: such as quantization
    engine: dict[str, Any] = {}

    @property
    def members(self) -> tuple[int, ...] | tuple[str, ...]:
        """What the members of its pool are known by: their numbers, or the address of the server
        that each asks."""
        if self.backend == "server":
            return tuple(map(normal, self.urls))
        return tuple(range(self.replicas))


class TeacherConfig(ScorerConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a teacher is, and what it is shown. With the student's own model it is a
    self-teacher."""

    # Local directory or hub id; its tokenizer must know the student's tokens by their ids. Of a
    # server what its tokenizer, ends and context are read from here: no weights.
    model: str
    # Its end tokens, each with the student's that it is read as: log-prob and place among the
    # candidates of either are the other's, and the student never samples the teacher's.
    ends_as: dict[str, str] = {}
    # Its own way of reading, by its own tokenizer: true is that tokenizer's template, a text is one
    # in Jinja, or the file of one, which ends in .jinja. false: as the student reads.
    chat_template: bool | str = False
    # A system message before the row's messages, or in place of the one that they begin with; ""
    # is one without any text.
    system: Annotated[str, Meta(min_length=0)] | None = None
    # For the teacher's own rendering of the prompt, beside data.template_args.
    template_args: dict[str, Any] = {}
    context: str | None = None  # shown instead of the prompt: text with {prompt} and {solution}
    # Of its own rendering; absent: data.max_prompt_tokens.
    max_prompt_tokens: Annotated[int, Meta(ge=1)] | None = None
    # How a self-teacher follows the student; transformers only.
    update: Literal["frozen", "ema", "copy"] = "frozen"
    # The learner waits: a checkpoint is written and read.
    update_every_steps: Annotated[int, Meta(ge=1)] = 1
    ema_decay: Annotated[float, Meta(gt=0, lt=1)] = 0.99  # d of t = d·t + (1-d)·s, ema only
    evaluate: bool = False  # measure the teacher's own accuracy, once, after training

    @property
    def template_file(self) -> str | None:
        """The file that `chat_template` names; None where it names none."""
        template = self.chat_template
        return template if isinstance(template, str) and not JINJA.search(template) else None


class ReferenceConfig(ScorerConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The policy that some objectives measure against: never updated, and shown what the student is
    shown. Absent with student.lora, the learner's frozen base."""

    model: str | None = None  # absent: student.model, the student before its first step


class TeacherSamplingConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Phased teacher sampling: `teacher.model` itself, on vLLM, answers a share of the prompts,
    once each; what the verifier finds right is trained by cross-entropy times a weight,
    `maths.schedules.phased_weight`. Of a check that gives rewards from 0 to 1 that is what has 1:
    anything less counts as wrong.

    SG-OPD, https://arxiv.org/abs/2606.09304, Eq. 2-3 and 11. The ends of the weight are a
    reconstruction: the paper gives neither. Where the teacher is not right the student answers
    instead. A prompt that the teacher answered adds one trajectory to its step, not
    rollout.samples_per_prompt. A synchronous run with it does not repeat itself.
    """

    share: Annotated[float, Meta(gt=0, lt=1)]  # of the prompts; 0.125 in the paper's best run
    full_until_step: Annotated[int, Meta(ge=0)]  # P1: last optimizer step of the full weight
    until_step: Annotated[int, Meta(ge=1)]  # P2: last optimizer step of any weight
    weight_start: Annotated[float, Meta(gt=0)] = 1.0  # until P1
    weight_end: Annotated[float, Meta(ge=0)] = 0.0  # at P2
    # Absent: rollout.max_new_tokens, the most there may be.
    max_new_tokens: Annotated[int, Meta(ge=1)] | None = None
    # Engines; dtype, memory, tensor_parallel_size and the table `engine` are those of [teacher].
    generators: Annotated[int, Meta(ge=1)] = 1
    concurrency: Annotated[int, Meta(ge=1)] = 64  # sequences one of them runs at once

    def weight(self, step: int) -> float:
        """Of what is trained at optimizer step `step`."""
        return schedules.phased_weight(
            step,
            full_until=self.full_until_step,
            until=self.until_step,
            start=self.weight_start,
            end=self.weight_end,
        )

    def is_trained_at(self, step: int) -> bool:
        """Whether the teacher's answers have a weight at optimizer step `step`."""
        return self.weight(step) > 0

    def most(self, groups_per_step: int) -> int:
        """Answers in one step: the share of its groups, rounded up."""
        return ceil(self.share * groups_per_step)
