"""Forward and backward of one micro-batch by the learner's own step, without DeepSpeed."""

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

from async_opd.config.sections import SyncConfig
from async_opd.objectives.opd import Opd
from async_opd.roles.learner.batch import MicroBatch, TrainingBounds, pack
from async_opd.roles.learner.config import LearnerConfig
from async_opd.roles.learner.step import StepContext, Student, accumulate
from async_opd.roles.models import causal_lm
from async_opd.tools.plan import memory, shape
from async_opd.tools.plan.memory import Memory
from async_opd.tools.plan.passes import packed
from tests.gpu.place import GIB, Place, Record, Unfit
from tests.roles.learner.trajectories import trajectory

PROMPT = 2  # tokens
PLAN_WITHIN = 0.1  # of what `async-opd plan` says
KERNELS = 12  # that are listed


def step(place: Place, record: Record, checkpointing: bool) -> None:
    """One micro-batch of each kind of lengths: time, share of the card's arithmetic, and memory
    within a tenth of what `async-opd plan` counts for its backward pass."""
    planned = plan(place, checkpointing=checkpointing).either["backward"] / GIB
    lm = random_student(place, checkpointing)
    held = 2 * sum(p.numel() * p.element_size() for p in lm.parameters()) / GIB
    if place.device == "cuda" and planned + held > place.card_gib():
        raise Unfit(f"needs {planned + held:.0f} GiB by plan, the card has {place.card_gib():.0f}")
    for kind in ("one", "even", "tail"):
        parts = place.lengths(kind)
        cost = place.timed(one_step(lm, micro_batch(place, parts)), repeat=2)
        record(
            kind,
            seconds=cost.seconds,
            tokens_per_s=sum(parts) / cost.seconds,
            gib=cost.gib,
            plan_gib=planned,
            **place.of_peak(arithmetic(lm, parts) / cost.seconds),
        )
        assert place.device == "cpu" or abs(cost.gib / planned - 1) <= PLAN_WITHIN, (
            f"{kind}: {cost.gib:.2f} GiB, by plan {planned:.2f}"
        )


def kernels(place: Place, record: Record) -> None:
    """Which kernels a micro-batch spends its time in, and how many it launches."""
    work = one_step(random_student(place, True), micro_batch(place, place.lengths("tail")))
    work()
    place.synchronize()
    activity = ProfilerActivity.CUDA if place.device == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiled:
        work()
        place.synchronize()
    spent = f"self_{'device' if place.device == 'cuda' else 'cpu'}_time_total"
    events = {
        event.key: (getattr(event, spent), event.count)
        for event in profiled.key_averages()
        if getattr(event, spent) > 0  # the card did something
    }
    total = sum(microseconds for microseconds, _ in events.values())
    record("all", ms=total / 1e3, launches=sum(count for _, count in events.values()))
    for name, (microseconds, count) in sorted(events.items(), key=lambda e: -e[1][0])[:KERNELS]:
        record(name[:60], ms=microseconds / 1e3, share=microseconds / total, launches=count)


def learner_config(place: Place, **settings) -> LearnerConfig:
    """The settings of a learner that trains one micro-batch a step in bfloat16."""
    defaults = dict(
        trajectories_per_step=1,
        lr=1e-5,
        zero_stage=1,
        dtype="bfloat16",
        micro_batch_tokens=place.tokens,
        gradient_checkpointing=True,
    )
    return LearnerConfig(**defaults | settings)


def plan(place: Place, *, checkpointing: bool, **settings) -> Memory:
    """What `async-opd plan` counts for such a learner, whose weights travel over gloo."""
    config = learner_config(place, gradient_checkpointing=checkpointing, **settings)
    student = shape.read(Qwen3Config(**place.large).to_dict(), "student")
    batch = packed(student, [config.micro_batch_tokens], padded=False)
    return memory.learner(config, student, SyncConfig(), batch, Opd().needs())


def random_student(place: Place, checkpointing: bool) -> PreTrainedModel:
    """Make a student of random weights that learns in bfloat16. Its gradients are there before
    anything is measured, as in a run."""
    torch.manual_seed(0)
    with torch.device(place.device):
        lm = AutoModelForCausalLM.from_config(
            Qwen3Config(**place.large),
            attn_implementation=causal_lm.ATTENTION,
            dtype=torch.bfloat16,
        )
    lm.train()
    if checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    for parameter in lm.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return lm


def one_step(lm: PreTrainedModel, micro: MicroBatch) -> Callable[[], object]:
    """Give the work of `micro` on one rank, the optimizer apart."""
    rows = LearnerConfig(trajectories_per_step=1, lr=1e-5).head_chunk_rows
    student = Student(lm, temperature=1.0, chunk_rows=rows)

    def work() -> None:
        accumulate(
            student,
            torch.Tensor.backward,
            lambda tensor, op: None,
            Opd(),
            [micro],
            StepContext(step=2, max_lag_steps=4),
        )

    return work


def micro_batch(place: Place, parts: list[int]) -> MicroBatch:
    """Pack trajectories of so many tokens each."""
    members = [
        trajectory(PROMPT, [(0, n - PROMPT)], id=f"{i}#0", seed=i) for i, n in enumerate(parts)
    ]
    bounds = TrainingBounds(max_lag_steps=4, stale="mask", truncated="train", cap=max(parts))
    return pack(members, bounds, live=1, device=torch.device(place.device))


def arithmetic(lm: PreTrainedModel, parts: list[int]) -> float:
    """Count the multiplications and additions of a forward and a backward, as MFU does: what
    checkpointing does again is none of it, and causal attention is half a square."""
    config = lm.config
    squares = sum(n * n for n in parts)
    parameters = sum(p.numel() for p in lm.parameters())
    width = config.num_attention_heads * config.head_dim
    return 6 * parameters * sum(parts) + 6 * config.num_hidden_layers * width * squares
