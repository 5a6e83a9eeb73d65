"""Sections of a config that are no one role's."""

from typing import Annotated, Literal

from msgspec import Meta, Struct

from async_opd.core.lora import LoraConfig


class RunConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is run, how stale it may become, and where its files go."""

    dir: str  # run directory; made new
    steps: Annotated[int, Meta(ge=1)]  # optimizer steps
    seed: Annotated[int, Meta(ge=0, lt=2**31)] = 0
    # 0: strictly synchronous, 1: one step off, more: asynchronous
    max_lag_steps: Annotated[int, Meta(ge=0)] = 4
    # steps' worth of groups; absent: the lag + 1
    max_outstanding_steps: Annotated[float, Meta(ge=1)] | None = None
    # over-age tokens leave the loss, or their group is issued anew
    stale: Literal["mask", "drop"] = "mask"
    max_attempts: Annotated[int, Meta(ge=1)] = 3  # of one prompt, before its final drop
    # of the last two steps' worth of prompts; above it the run ends, behind a checkpoint
    max_failed_share: Annotated[float, Meta(ge=0, le=1)] = 0.5
    # 0: only by time, at the end, and on Ctrl-C
    checkpoint_every_steps: Annotated[int, Meta(ge=0)] = 100
    # since the last one, at the end of a step; 0: not by time
    checkpoint_minutes: Annotated[float, Meta(ge=0)] = 30.0
    # from the newest checkpoint, or the start, when what a run needs is lost; so many within
    # `restart_steps`
    max_restarts: Annotated[int, Meta(ge=0)] = 3
    restart_steps: Annotated[int, Meta(ge=1)] = 20  # of progress, behind which one counts no more
    keep_checkpoints: Annotated[int, Meta(ge=1)] = 3  # the last of them; the best is kept besides
    # between steps of which two responses are kept; 0: none
    samples_every_steps: Annotated[int, Meta(ge=0)] = 10
    # the last of them, at least, whose spans are kept; 0: none
    trace_steps: Annotated[int, Meta(ge=0)] = 50
    trust_remote_code: bool = False
    # all on one card: each has its gpu_memory_utilization of it, the learner what is left
    share_gpu: bool = False
    # of a row a step, besides metrics.jsonl
    sinks: tuple[Literal["wandb", "tensorboard", "prometheus"], ...] = ()


class StudentConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The model that is distilled into."""

    model: str  # local directory or hub id of a causal LM
    lora: LoraConfig | None = None  # absent: every weight is trained


class SyncConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How weights travel from the learner to the generators."""

    backend: Literal["gloo", "nccl"] = "gloo"  # by way of host memory, or GPU to GPU
    bucket_mib: Annotated[int, Meta(ge=1)] = 256
    timeout_s: Annotated[float, Meta(gt=0)] = 20.0  # of one update
    parity_every_steps: Annotated[int, Meta(ge=1)] = 10  # probes: generator against learner
    # nats on every token of a probe, where learner and generators compute in float32
    parity_tolerance: Annotated[float, Meta(gt=0)] = 1e-3
    # nats in the mean over a probe's tokens, where one of them does not: before the first step …
    parity_mean: Annotated[float, Meta(gt=0)] = 0.1
    parity_drift: Annotated[float, Meta(gt=0)] = 0.05  # … and what it may be above that later
    every_steps: Annotated[int, Meta(ge=1)] = 1  # between two updates; the last step has one
    # Of a student.lora, the adapter: merged with the weights that it changes, or alone, to engines
    # that keep the base as it is. Absent: merged.
    lora: Literal["merged", "adapter"] | None = None
    # of what is being sampled, at an update: computed anew by the new weights, or left as it is
    kv: Literal["recompute", "keep"] = "recompute"


class EvalConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Greedy accuracy on held-out rows: before, after and beside training."""

    path: str  # as data.path, with the same columns
    split: str = "train"
    problems: Annotated[int, Meta(ge=1)] = 256
    # by the generators while they train; 0: only before and after
    every_steps: Annotated[int, Meta(ge=0)] = 0


class TimeoutConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Bounds of every wait, in seconds."""

    # for GPUs to be there, and free; an autoscaler takes minutes
    nodes_s: Annotated[float, Meta(ge=0)] = 30.0
    # an actor with its model; and for so long all servers of one scorer may be away
    start_s: Annotated[float, Meta(gt=0)] = 300.0
    # one group, from when a generator takes it up: what waits for others has no bound of its own
    generate_s: Annotated[float, Meta(gt=0)] = 600.0
    score_s: Annotated[float, Meta(gt=0)] = 120.0  # likewise, by a teacher or the verifier
    step_s: Annotated[float, Meta(gt=0)] = 600.0  # one optimizer step, or one checkpoint
    # the step at hand and a checkpoint, on Ctrl-C and SIGTERM; behind an error at least 2 `step_s`
    last_save_s: Annotated[float, Meta(gt=0)] = 18.0
    health_s: Annotated[float, Meta(gt=0)] = 2.0  # between two looks at an actor and its engine
    # without a sign of life, after which an actor is given up
    stall_s: Annotated[float, Meta(gt=0)] = 30.0

    @property
    def group_s(self) -> float:
        """The longest that one group takes with nobody before it, and in which no role answers
        anything only where all are stuck: its generator is lost at the last moment, and it is
        scored at the fourth try."""
        return 2 * self.generate_s + self.start_s + 4 * self.score_s
