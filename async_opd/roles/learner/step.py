"""One optimizer step on one rank: forward, objective, the one reduction, backward."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from async_opd.core.vocabulary import Ids
from async_opd.core.wire import Needs
from async_opd.maths import segments
from async_opd.maths.advantages import Moments
from async_opd.maths.head import Without
from async_opd.maths.logprobs import Read, ReadOptions, read_logprobs
from async_opd.objectives import Objective
from async_opd.objectives.token_batch import TokenBatch
from async_opd.roles.learner.base import BaseBatch
from async_opd.roles.learner.batch import MicroBatch
from async_opd.roles.learner.lora import adapters_off
from async_opd.roles.learner.step_metrics import Measured
from async_opd.roles.models import causal_lm

NOTHING = Needs()
COUNTS = ("tokens", "sequences", "from_teacher")
Reduce = Callable[[Tensor, str], None]  # (tensor, "sum" | "max"), over all ranks, in place
# takes a micro-batch of the student's, with its number
Look = Callable[[int, MicroBatch, TokenBatch], None]


class Student(nn.Module):
    """The module DeepSpeed wraps. Log-probs are read inside its forward, so that ZeRO's hooks see
    the LM head."""

    def __init__(
        self,
        lm: PreTrainedModel,
        *,
        temperature: float,
        chunk_rows: int | None = None,
        head_float32: bool = False,
        vocabulary: Ids | None = None,
    ):
        """`vocabulary` is what log-probs are over; None: all ids of the head. The rest is as in
        `LearnerConfig`."""
        super().__init__()
        size = lm.config.get_text_config().vocab_size
        self._without = (
            Without.those_but(vocabulary, size, torch.device("cpu")) if vocabulary else None
        )
        self.lm = lm
        self.temperature = temperature
        self.chunk_rows = chunk_rows
        self.head_float32 = head_float32

    def forward(self, micro: MicroBatch | BaseBatch, needs: Needs = NOTHING) -> Any:
        """Read log-probs of the response tokens of `micro`, [N], at the candidates [N, K], and
        what `needs` asks for; of a `BaseBatch` what the model without its adapters says."""
        if isinstance(micro, BaseBatch):
            with adapters_off(self.lm):
                return micro.scoring.score(self.lm, micro.items)
        if self._without:
            marks_V = self._without.marks_V.to(micro.ids_L.device)
            self._without = self._without._replace(marks_V=marks_V)
        hidden_ND = causal_lm.hidden_states(self.lm, micro.ids_L, micro.segment_lengths)[
            micro.rows_N
        ]
        read = read_logprobs(
            hidden_ND,
            causal_lm.head(self.lm)._replace(without=self._without, float32=self.head_float32),
            micro.targets_N,
            ReadOptions(
                self.temperature,
                self.chunk_rows,
                entropy=needs.student_entropy,
                tail=needs.tail,
            ),
            candidate_ids_NK=micro.candidate_ids_NK,
        )
        return read._replace(hidden_ND=hidden_ND.detach()) if needs.hidden_state else read


@dataclass(frozen=True, kw_only=True)
class StepContext:
    """What a step is made with besides its micro-batches, the same on every rank."""

    step: int = 1  # the one that is being made, from 1
    max_lag_steps: int = 0  # of a trained token
    groups: int = 1  # of the step, over all ranks
    # over the trajectories of all past steps
    running: dict[str, Moments] = field(default_factory=dict[str, Moments])
    teacher_weight: float = 0.0  # α(step) of the cross-entropy on the teacher's own answers


def token_batch(
    micro: MicroBatch,
    read: Read | None,
    context: StepContext,
    statistics: dict[str, Tensor] | None = None,
) -> TokenBatch:
    """Collect what an objective sees of one micro-batch; without `read`, nothing of the live
    student."""
    return replace(
        micro,
        student_logp_N=read and read.sampled_N,
        student_logp_NK=read and read.candidates_NK,
        student_tail_logp_N=read and read.tail_N,
        student_entropy_N=read and read.entropy_N,
        hidden_ND=read and read.hidden_ND,
        step=context.step,
        groups=context.groups,
        statistics=statistics or {},
        running=context.running,
    )


@torch.no_grad()
def batch_statistics(
    module: Callable[..., Read],
    all_reduce: Reduce,
    objective: Objective,
    micros: list[MicroBatch],
    context: StepContext,
) -> dict[str, Tensor]:
    """Count kept `tokens` of the student, `sequences` that hold one and kept tokens of the
    teacher's own answers (`from_teacher`), and take the sums and maxima that `objective` declares;
    of every micro-batch and rank, 0-d float64, of groups one for each group.

    One forward of each micro-batch where the objective reads the live student for them. A maximum
    over no token is -inf.
    """
    needs = objective.needs()
    start: dict[str, float | list[float]] = dict.fromkeys(
        (*COUNTS, *needs.sums, *needs.response_sums), 0.0
    )
    start |= dict.fromkeys(needs.maxima, -torch.inf)
    start |= {name: [0.0] * context.groups for name in needs.group_sums}
    statistics = {
        name: torch.tensor(value, dtype=torch.float64, device=micros[0].ids_L.device)
        for name, value in start.items()
    }
    for micro in micros:
        read = module(micro, needs) if needs.first_pass else None
        if micro.from_teacher:
            statistics["from_teacher"] += micro.keep_N.sum()
        elif micro.keep_N.any() or (needs.group_sums and len(micro.keep_N)):
            batch = token_batch(micro, read, context)
            for name, value in objective.statistics(batch, micro.keep_N).items():
                join = torch.maximum if name in needs.maxima else torch.add
                statistics[name] = join(statistics[name], value)
    for name, value in statistics.items():
        all_reduce(value, "max" if name in needs.maxima else "sum")
    return statistics


def accumulate(
    module: Callable[..., Read],
    backward: Callable[[Tensor], None],
    all_reduce: Reduce,
    objective: Objective,
    micros: list[MicroBatch],
    context: StepContext,
    look: Look | None = None,
) -> tuple[dict[str, float], dict[str, Moments]]:
    """Run forward and backward over this rank's micro-batches; gradients add up to those of one
    big batch.

    loss = Σ over kept tokens of every rank ÷ their number (or as `objective.mean_over` says),
    all-reduced before the first backward, + α · mean cross-entropy of the teacher's own answers.
    `backward` takes this rank's share of it. `look` is shown each micro-batch of the student's.
    Returns metrics, and the running moments with this step's trajectories; both are equal on all
    ranks. Non-finite losses show in `loss`: the caller must look before the optimizer moves. Where
    no token is kept anywhere there is nothing to go backward from: no `backward` is called.
    """
    statistics = batch_statistics(module, all_reduce, objective, micros, context)
    needs = objective.needs()
    measured = Measured(objective, context.max_lag_steps, micros[0].ids_L.device)
    if not statistics["tokens"] + statistics["from_teacher"]:
        module, backward = torch.no_grad()(module), _nothing
    for number, micro in enumerate(micros):
        read = module(micro, Needs() if micro.from_teacher else needs)
        if not len(micro.targets_N):  # joins backward
            backward(read.sampled_N.sum())
        elif micro.from_teacher:
            share = -read.sampled_N[micro.keep_N].sum() / statistics["from_teacher"].clamp(min=1)
            backward((context.teacher_weight * share).float())
            measured.from_teacher(context.teacher_weight, share)
        else:
            batch = token_batch(micro, read, context, statistics)
            if look:
                look(number, micro, batch)
            result = objective.loss(batch)
            loss_N = result.loss_N * shares(objective, micro, statistics)
            backward(loss_N[micro.keep_N].sum().float())
            measured.add(micro, batch, result, loss_N)
    return measured.reduced(all_reduce, statistics), measured.merged(context.running)


def _nothing(loss: Tensor) -> None:
    """Go nowhere from a loss over no token."""


def shares(objective: Objective, micro: MicroBatch, statistics: dict[str, Tensor]) -> Tensor:
    """Compute what each kept token's loss is multiplied by in the one reduction, [N]."""
    if objective.mean_over != "sequences":
        return (1 / statistics[objective.mean_over].clamp(min=1)).expand(len(micro.segment_N))
    kept_S = segments.sums(micro.keep_N.float(), micro.segment_N, len(micro.reward_S))
    return 1 / (kept_S.clamp(min=1)[micro.segment_N] * statistics["sequences"].clamp(min=1))
