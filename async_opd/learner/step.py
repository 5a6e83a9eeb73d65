"""One optimizer step on one rank: forward, objective, the one reduction, backward."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from async_opd import causal_lm
from async_opd.learner.batch import MicroBatch
from async_opd.maths.importance import effective_sample_size
from async_opd.maths.logprobs import Read, read_logprobs
from async_opd.objectives import Objective
from async_opd.objectives.base import TokenBatch, TokenLoss


class Student(nn.Module):
    """The module DeepSpeed wraps. Log-probs are read inside its forward, so that ZeRO's hooks see the LM head."""

    def __init__(self, lm: PreTrainedModel, *, temperature: float, chunk_rows: int):
        super().__init__()
        self.lm, self.temperature, self.chunk_rows = lm, temperature, chunk_rows

    def forward(self, micro: MicroBatch, entropy: bool = False) -> Read:
        """Log-probs of the response tokens of `micro`, [N], at the candidates [N, K], and entropies if asked."""
        hidden_LD = causal_lm.hidden_states(self.lm, micro.ids_L, micro.segment_lengths)
        return read_logprobs(
            hidden_LD[micro.rows_N],
            causal_lm.head(self.lm),
            micro.targets_N,
            temperature=self.temperature,
            chunk_rows=self.chunk_rows,
            entropy=entropy,
            candidate_ids_NK=micro.candidate_ids_NK,
        )


def token_batch(micro: MicroBatch, read: Read) -> TokenBatch:
    """What an objective sees of one micro-batch."""
    return TokenBatch(
        student_logp_N=read.sampled_N,
        behaviour_logp_N=micro.behaviour_logp_N,
        teacher_logp_N=micro.teacher_logp_N,
        segment_N=micro.segment_N,
        reward_S=micro.reward_S,
        student_logp_NK=read.candidates_NK,
        teacher_logp_NK=micro.teacher_logp_NK,
        student_entropy_N=read.entropy_N,
        teacher_entropy_N=micro.teacher_entropy_N,
    )


def token_loss(objective: Objective, micro: MicroBatch, read: Read, statistics: dict[str, Tensor]) -> TokenLoss:
    """The objective's unreduced loss [N] of one micro-batch; an empty one gives an empty loss that joins backward."""
    if not len(micro.targets_N):
        return TokenLoss(read.sampled_N, read.sampled_N.detach())
    return objective.loss(replace(token_batch(micro, read), statistics=statistics))


@torch.no_grad()
def batch_statistics(
    module: Callable[..., Read],
    all_reduce: Callable[[Tensor, str], None],
    objective: Objective,
    micros: list[MicroBatch],
) -> dict[str, Tensor]:
    """The sums and maxima that `objective` declares, over the kept tokens of every micro-batch and rank, 0-d float32.

    One forward of each micro-batch, and none where nothing is declared. A maximum over no token is -inf.
    """
    needs = objective.needs()
    start = dict.fromkeys(needs.sums, 0.0) | dict.fromkeys(needs.maxima, -torch.inf)
    if not start:
        return {}
    device = micros[0].ids_L.device
    found = {name: torch.tensor(value, dtype=torch.float64, device=device) for name, value in start.items()}
    for micro in micros:
        read = module(micro, entropy=needs.student_entropy)
        if micro.keep_N.any():
            value_N = objective.statistics(token_batch(micro, read))
            for name in needs.sums:
                found[name] += value_N[name][micro.keep_N].sum(dtype=torch.float64)
            for name in needs.maxima:
                found[name] = torch.maximum(found[name], value_N[name][micro.keep_N].max().double())
    for name, value in found.items():
        all_reduce(value, "sum" if name in needs.sums else "max")
    return {name: value.float() for name, value in found.items()}


def accumulate(
    module: Callable[..., Read],
    backward: Callable[[Tensor], None],
    all_reduce: Callable[[Tensor, str], None],
    objective: Objective,
    micros: list[MicroBatch],
) -> dict[str, float]:
    """Forward and backward over this rank's micro-batches; gradients add up to those of one big batch.

    loss = Σ over kept tokens of every rank ÷ their number, all-reduced before the first backward. `backward` takes
    this rank's share of it. `all_reduce(tensor, "sum" | "max")` works in place. Returns metrics equal on all ranks.
    Non-finite losses show in `loss`: the caller must look before the optimizer moves.
    """
    count = torch.stack([micro.keep_N.sum() for micro in micros]).sum().double()
    all_reduce(count, "sum")
    statistics = batch_statistics(module, all_reduce, objective, micros)
    sums = torch.zeros(len(SUMS), dtype=torch.float64, device=count.device)
    maxima = torch.zeros(len(MAXIMA), dtype=torch.float64, device=count.device)
    for micro in micros:
        read = module(micro, entropy=objective.needs().student_entropy)
        result = token_loss(objective, micro, read, statistics)
        loss = result.loss_N[micro.keep_N].sum() / count.clamp(min=1)
        backward(loss.float())
        _measure(micro, read, result, sums, maxima)
    all_reduce(sums, "sum")
    all_reduce(maxima, "max")
    return _metrics(
        count.item(), dict(zip(SUMS, sums.tolist(), strict=True)), dict(zip(MAXIMA, maxima.tolist(), strict=True))
    )


SUMS = ("loss", "kl", "weight", "weight_squared", "stale_log_ratio", "stale", "lag", "excluded")
MAXIMA = ("weight", "mismatch", "lag")


@torch.no_grad()
def _measure(micro: MicroBatch, read: Read, result: TokenLoss, sums: Tensor, maxima: Tensor) -> None:
    keep, lag_N = micro.keep_N, micro.lag_N
    gap_N = (read.sampled_N - micro.behaviour_logp_N).abs()
    fresh, stale = keep & (lag_N == 0), keep & (lag_N > 0)
    weight_N = result.weight_N[keep].double()
    sums += torch.stack(
        [
            result.loss_N[keep].double().sum(),
            (read.sampled_N - micro.teacher_logp_N)[keep].double().sum(),
            weight_N.sum(),
            weight_N.square().sum(),
            gap_N[stale].double().sum(),
            stale.sum().double(),
            lag_N[keep].double().sum(),
            (~keep).sum().double(),
        ]
    )
    for at, values in enumerate((weight_N, gap_N[fresh].double(), lag_N[keep].double())):
        if len(values):
            maxima[at] = torch.maximum(maxima[at], values.max())


def _metrics(count: float, sums: dict[str, float], maxima: dict[str, float]) -> dict[str, float]:
    mean = {name: total / max(count, 1) for name, total in sums.items()}
    return {
        "tokens": count,
        "tokens_excluded": sums["excluded"],
        "loss": mean["loss"],
        "kl": mean["kl"],  # nats a token: mean log π_student - log π_teacher of the sampled tokens
        "weight_mean": mean["weight"],
        "weight_max": maxima["weight"],
        "weight_ess": effective_sample_size(sums["weight"], sums["weight_squared"], count),
        "log_ratio_stale": sums["stale_log_ratio"] / max(sums["stale"], 1),  # nats, mean |student - behaviour|, lag > 0
        "log_ratio_fresh_max": maxima["mismatch"],  # nats, max |student - behaviour| at lag 0: engine mismatch alone
        "lag_mean": mean["lag"],
        "lag_max": maxima["lag"],
    }
