"""What a step's metrics are made of: sums and maxima over its micro-batches, then over all
ranks."""

from collections.abc import Callable

import torch
from torch import Tensor

from async_opd.maths.advantages import Moments
from async_opd.maths.importance import effective_sample_size
from async_opd.objectives import Objective
from async_opd.objectives.token_batch import ComposedLoss, TokenBatch, declared
from async_opd.roles.learner.batch import MicroBatch

FACTORS = ("method", "ratio", "advantage")  # of the importance weight W · ρ̃ · |A|
SUMS = (
    "loss",
    "kl",
    "entries",
    "weight",
    "weight_squared",
    "ratio",
    "ratio_squared",
    "selected",
    "stale_log_ratio",
    "stale",
    "lag",
    "kv_lag",
    "excluded",
    "teacher_loss",
    "surprise",
    "responses",
    "response_tokens",
    "logs",
    "log",
    "log_squared",
    *(f"log_{factor}" for factor in FACTORS),
    *(f"log_{factor}_log" for factor in FACTORS),
)
MOMENTS = ("count", "total", "squares")  # of a quantity of each trajectory
METRIC = ("metric", "unmeasured")  # of each of the objective's own: its sum, and tokens without it
MAXIMA = ("weight", "ratio", "mismatch", "lag")


class Measured:
    """Adds up what one rank's micro-batches show."""

    def __init__(self, objective: Objective, max_lag_steps: int, device: torch.device):
        self._objective, self._lags = objective, range(max_lag_steps + 1)
        self._running = objective.needs().running
        names = [
            *SUMS,
            *(f"{part}_{name}" for name in objective.metric_names for part in METRIC),
            *(f"tokens_lag_{lag}" for lag in self._lags),
            *(f"{part}_{name}" for name in self._running for part in MOMENTS),
        ]
        self._sums = {name: torch.zeros((), dtype=torch.float64, device=device) for name in names}
        self._maxima = {
            name: torch.zeros((), dtype=torch.float64, device=device) for name in MAXIMA
        }

    @torch.no_grad()
    def add(
        self, micro: MicroBatch, batch: TokenBatch, result: ComposedLoss, loss_N: Tensor
    ) -> None:
        """Add one micro-batch of the student's rollouts; `loss_N` is each token's part of the
        step's loss."""
        keep, sampled_N = micro.keep_N, declared(batch.student_logp_N)
        gap_N = (sampled_N - batch.behaviour_logp_N).abs()
        fresh, stale = keep & (micro.lag_N == 0), keep & (micro.lag_N > 0)
        self._sum(
            {
                "loss": loss_N[keep],
                "kl": (sampled_N - batch.teacher_logp_N)[keep],
                "selected": result.selected_N[keep],
                "surprise": -batch.behaviour_logp_N[keep],
                "responses": torch.ones_like(batch.reward_S),
                "response_tokens": torch.ones_like(sampled_N),
                "stale_log_ratio": gap_N[stale],
                "stale": stale,
                "lag": micro.lag_N[keep],
                "kv_lag": micro.kv_lag_N[keep],
                "excluded": ~keep,
                **{f"tokens_lag_{lag}": keep & (micro.lag_N == lag) for lag in self._lags},
            }
        )
        for name in self._objective.metric_names:
            value = result.metrics[name][keep].double()
            self._sum({f"metric_{name}": value.nan_to_num(), f"unmeasured_{name}": value.isnan()})
        self._largest("mismatch", gap_N[fresh])
        self._largest("lag", micro.lag_N[keep])
        self._weights(result, keep & result.selected_N)
        value_S_by_name = self._objective.moments(batch) if self._running else {}
        for name in self._running:
            value_S = value_S_by_name[name]
            known_S = value_S[~value_S.isnan()].double()
            self._sum(
                {
                    f"count_{name}": torch.ones_like(known_S),
                    f"total_{name}": known_S,
                    f"squares_{name}": known_S.square(),
                }
            )

    @torch.no_grad()
    def from_teacher(self, weight: float, mean: Tensor) -> None:
        """Add one micro-batch of the teacher's own answers, by its share of their mean
        cross-entropy."""
        self._sum({"teacher_loss": mean, "loss": weight * mean})

    def reduced(
        self, all_reduce: Callable[[Tensor, str], None], statistics: dict[str, Tensor]
    ) -> dict[str, float]:
        """Reduce to the step's metrics, equal on all ranks."""
        for parts, op in ((self._sums, "sum"), (self._maxima, "max")):
            values = torch.stack(list(parts.values()))
            all_reduce(values, op)
            parts.update(zip(parts, values.unbind(), strict=True))
        sums = {name: value.item() for name, value in self._sums.items()}
        metrics = _metrics(
            {name: statistics[name].item() for name in ("tokens", "from_teacher")},
            sums,
            {name: value.item() for name, value in self._maxima.items()},
        )
        return (
            metrics
            | {n: self._metric(n, sums, metrics["tokens"]) for n in self._objective.metric_names}
            | {f"tokens_lag_{lag}": sums[f"tokens_lag_{lag}"] for lag in self._lags}
        )

    def _metric(self, name: str, sums: dict[str, float], tokens: float) -> float:
        """Take the mean over the kept tokens that have the metric; NaN where none has it."""
        measured = max(tokens, 1) - sums[f"unmeasured_{name}"]
        return sums[f"metric_{name}"] / measured if measured else float("nan")

    def merged(self, running: dict[str, Moments]) -> dict[str, Moments]:
        """Merge this step's trajectories into `running`; after `reduced`."""
        return {
            name: running[name].with_sums(*(self._sums[f"{p}_{name}"].item() for p in MOMENTS))
            for name in self._running
        }

    def _weights(self, result: ComposedLoss, chosen: Tensor) -> None:
        """Add mean, size and spread of W · ρ̃ · |A|, and of each factor's logarithm."""
        one = result.weight_N.new_ones(())
        ratio = one if result.ratio is None else result.ratio
        size = one if result.advantage is None else result.advantage.abs()
        several = max(ratio.ndim, size.ndim) == 2
        method = result.weight_N[:, None] if several else result.weight_N
        factors = torch.broadcast_tensors(method, ratio, size)
        method, ratio, size = (factor[chosen].double().flatten() for factor in factors)
        weight = method * ratio * size
        self._sum({"entries": torch.ones_like(weight)})
        for name, value in (("weight", weight), ("ratio", ratio)):
            self._sum({name: value, f"{name}_squared": value.square()})
            self._largest(name, value)
        some = weight > 0
        log = weight[some].log()
        self._sum({"logs": torch.ones_like(log), "log": log, "log_squared": log.square()})
        for name, factor in zip(FACTORS, (method, ratio, size), strict=True):
            part = factor[some].log()
            self._sum({f"log_{name}": part, f"log_{name}_log": part * log})

    def _sum(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self._sums[name] += value.sum(dtype=torch.float64)

    def _largest(self, name: str, values: Tensor) -> None:
        if len(values):
            self._maxima[name] = torch.maximum(self._maxima[name], values.max().double())


def _metrics(
    statistics: dict[str, float], sums: dict[str, float], maxima: dict[str, float]
) -> dict[str, float]:
    tokens, entries = max(statistics["tokens"], 1), max(sums["entries"], 1)
    metrics = {
        "tokens": statistics["tokens"],
        "tokens_excluded": sums["excluded"],
        "tokens_taught": statistics["from_teacher"],
        "loss": sums["loss"],
        # mean cross-entropy of the teacher's own answers, nats a token
        "loss_taught": sums["teacher_loss"],
        # nats a token: mean log π_student - log π_teacher of the sampled tokens
        "kl": sums["kl"] / tokens,
        # nats: of the policy that sampled, as its own tokens estimate it
        "entropy": sums["surprise"] / tokens,
        # tokens of the student's responses
        "length_mean": sums["response_tokens"] / max(sums["responses"], 1),
        "selected": sums["selected"] / tokens,
        # nats, mean |student - behaviour|, lag > 0
        "log_ratio_stale": sums["stale_log_ratio"] / max(sums["stale"], 1),
        # nats, max |student - behaviour| at lag 0: engine mismatch alone
        "log_ratio_fresh_max": maxima["mismatch"],
        "lag_mean": sums["lag"] / tokens,
        "lag_max": maxima["lag"],
        # versions that the KV which a token attended to was behind its own weights
        "kv_lag_mean": sums["kv_lag"] / tokens,
    }
    for name in ("weight", "ratio"):  # W · ρ̃ · |A| and ρ̃ of the selected tokens
        total, squares = sums[name], sums[f"{name}_squared"]
        metrics |= {
            f"{name}_mean": total / entries,
            f"{name}_max": maxima[name],
            f"{name}_ess": effective_sample_size(total, squares, entries),
        }
    logs = max(sums["logs"], 1)
    variance = sums["log_squared"] / logs - (sums["log"] / logs) ** 2
    # its share of the variance of log(W · ρ̃ · |A|); they add up to 1 where that varies
    for factor in FACTORS:
        product, mean = sums[f"log_{factor}_log"] / logs, sums[f"log_{factor}"] / logs
        covariance = product - mean * sums["log"] / logs
        metrics[f"weight_by_{factor}"] = covariance / variance if variance > 1e-12 else 0.0
    return metrics
