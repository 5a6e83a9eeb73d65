"""What objectives of the sampled token share: ℓ = -sg[W · ρ̃ · A] · log π, and the ratios ρ̃ that
correct staleness."""

import math
from functools import partial
from typing import Annotated, ClassVar, Literal

from msgspec import Meta, Struct

from async_opd.core.wire import Needs
from async_opd.maths import Tensor, advantages, importance, segments
from async_opd.objectives.base import Objective
from async_opd.objectives.modifiers import Bound, Range, check_bounds, refuse_change
from async_opd.objectives.reward import RUNNING, Reward
from async_opd.objectives.token_batch import TokenBatch, TokenLoss, declared


class Importance(
    Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="importance", tag_field="tag"
):
    """ρ̃ detached: ρ of the token, of its sequence, or of its sequence's geometric mean, or 1; then
    truncated.

    Of a prefix, the tokens up to this one: their product C_t, which corrects the state as well, so
    that C_t · A_t is the exact token-local gradient under the live student's own prefixes, or its
    mean w_t = C_t^(1/t), which varies less and is biased (PNPO, arXiv:2608.01418; EXACT, there
    with a group's outcome for A; with A of distillation RECONSTRUCTION). `narrowing` is PNPO's
    gate: what it rejects still counts in the mean. Its tolerances scale with length: e · √L is
    0.087 and 0.118 in the paper, so 7e-4 and 9.5e-4 at 15,360 tokens, and 0.0137 and 0.0186 at 40.
    """

    ratio: Literal["token", "sequence", "geometric", "prefix", "prefix_normalised", "none"] = (
        "token"
    )
    at_most: Bound | None = None  # min(ρ, c)
    between: Range | None = None  # ρ · 1[a ≤ ρ ≤ b]
    # ρ · 1[1 - e₀ √(L/t) ≤ ρ ≤ 1 + e₁ √(L/t)] at token t of L; of "prefix_normalised"
    narrowing: Range | None = None

    def __post_init__(self) -> None:
        check_bounds(self.at_most, self.between)
        if self.ratio == "none":
            refuse_change(self, "at_most", "ratio = 'none'")
            refuse_change(self, "between", "ratio = 'none'")
        if self.ratio != "prefix_normalised":
            refuse_change(self, "narrowing", f"ratio = {self.ratio!r}")

    @property
    def of_prefix(self) -> bool:
        """Whether it corrects how likely the student is to come to the prefix."""
        return self.ratio in ("prefix", "prefix_normalised")

    def apply(
        self, batch: TokenBatch, logp: Tensor, behaviour_logp: Tensor, signal: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return (-sg[ρ̃ · signal] · log π, ρ̃) of the sampled token [N] or of M samples a position
        [N, M]."""
        ratio = self._ratio(batch, logp.detach(), behaviour_logp)
        factor = importance.truncate(ratio, at_most=self.at_most, between=self.between)
        if self.narrowing:
            factor = factor * self._kept(batch, ratio)
        return -factor * signal * logp, factor

    def metrics(self, batch: TokenBatch) -> dict[str, Tensor]:
        """Mark what `narrowing` lets pass of the generated tokens in each quarter of a response,
        [N]; NaN outside the quarter."""
        if not self.narrowing:
            return {}
        logp_N = declared(batch.student_logp_N).detach()
        kept_N = self._kept(batch, self._ratio(batch, logp_N, batch.behaviour_logp_N))
        length_N = segments.lengths(batch.segment_N, batch.trajectories)[batch.segment_N]
        quarter_N = 4 * segments.places(batch.segment_N) // length_N + 1
        return {
            f"prefix_kept_{quarter}": kept_N.to(logp_N.dtype).where(quarter_N == quarter, math.nan)
            for quarter in (1, 2, 3, 4)
        }

    def _kept(self, batch: TokenBatch, ratio: Tensor) -> Tensor:
        below, above = self.narrowing or (math.inf, math.inf)
        return importance.narrowing(
            ratio, batch.segment_N, batch.trajectories, below=below, above=above
        )

    def _ratio(self, batch: TokenBatch, logp: Tensor, behaviour_logp: Tensor) -> Tensor:
        if self.ratio == "none":
            return logp.new_ones(logp.shape)
        if self.ratio == "token":
            return importance.ratio(logp, behaviour_logp)
        of_several = {
            "sequence": partial(importance.sequence_ratio, count=batch.trajectories),
            "geometric": partial(importance.geometric_ratio, count=batch.trajectories),
            "prefix": importance.prefix_product,
            "prefix_normalised": importance.normalised_prefix,
        }
        return of_several[self.ratio](
            declared(batch.student_logp_N).detach(),
            batch.behaviour_logp_N,
            batch.segment_N,
            instead_NM=logp - behaviour_logp if logp.ndim == 2 else None,
        )


class Ppo(
    Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="ppo", tag_field="tag"
):
    """-min(ρ · A, clip(ρ, 1-ε, 1+ε) · A), gradient through ρ; for A < 0 no more than c · |A| by the
    dual clip."""

    clip: Annotated[float, Meta(gt=0, lt=1)] = 0.2
    dual_clip: Annotated[float, Meta(gt=1)] | None = None  # verl: 3.0

    def metrics(self, batch: TokenBatch) -> dict[str, Tensor]:
        """Show nothing."""
        return {}

    def apply(
        self, batch: TokenBatch, logp: Tensor, behaviour_logp: Tensor, signal: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return (the clipped surrogate's negative, its factor detached)."""
        ratio = importance.ratio(logp, behaviour_logp)
        factor = importance.clipped(ratio, signal, clip=self.clip, dual_clip=self.dual_clip)
        return -factor * signal, factor.detach()


class Sampled(Objective, frozen=True, kw_only=True):
    """An objective of the sampled token: OPD, where a subclass gives neither an `advantage` nor a
    `weight` of its own."""

    anchors: ClassVar[bool] = True

    correction: Importance | Ppo = Importance()
    # cached: the signal takes the behaviour policy's log-prob
    student_signal: Literal["live", "cached"] = "live"
    reward: Reward | None = None  # beside distillation; absent: distillation alone

    def needs(self) -> Needs:
        """Say what must be supplied, for a task reward as well."""
        needs = super().needs()
        return self.reward.needs(needs) if self.reward else needs

    def moments(self, batch: TokenBatch) -> dict[str, Tensor]:
        """Compute what running moments are taken of, those of a task reward among them."""
        moments = super().moments(batch)
        if self.reward and self.reward.past:
            moments[RUNNING] = self.reward.rewards(batch)
        return moments

    def advantage(self, batch: TokenBatch) -> Tensor:
        """Compute A [N], detached: positive makes the token likelier; log π_T - log π."""
        return self.teacher_minus_student(batch)

    def weight(self, batch: TokenBatch) -> Tensor:
        """Compute the method's own W [N], detached."""
        return batch.behaviour_logp_N.new_ones(len(batch.behaviour_logp_N))

    def token_loss(self, batch: TokenBatch) -> TokenLoss:
        """Compute ℓ [N], by the correction."""
        logp_N, advantage_N = declared(batch.student_logp_N), self.advantage(batch)
        if self.reward:
            advantage_N = advantage_N + self.reward.part(batch)
        advantage_N, bounded_N = self.bounded(
            self.anchored(advantage_N, logp_N, batch.behaviour_logp_N)
        )
        weight_N = self.weight(batch)
        loss_N, ratio_N = self.correction.apply(
            batch,
            logp_N,
            batch.behaviour_logp_N,
            weight_N * advantage_N,
        )
        return TokenLoss(
            loss_N=loss_N,
            weight_N=weight_N,
            advantage=advantage_N,
            ratio=ratio_N,
            bounded_N=bounded_N,
        )

    def composed_metrics(self, batch: TokenBatch) -> dict[str, Tensor]:
        """Compute those of `freshness`, of the correction and of a task reward."""
        metrics = super().composed_metrics(batch) | self.correction.metrics(batch)
        if self.reward:
            metrics |= self.reward.shares(self.reward.part(batch), self.advantage(batch))
        return metrics

    def anchored(self, advantage: Tensor, logp: Tensor, behaviour_logp: Tensor) -> Tensor:
        """Lower an advantage by the anchor of `freshness`, where one is set; [N] or [N, M]."""
        if not (self.freshness and self.freshness.lam):
            return advantage
        return advantage - self.freshness.anchor(logp, behaviour_logp)

    def signal_logp(self, batch: TokenBatch) -> Tensor:
        """Choose the student's log-probs that the signal takes, [N], detached."""
        return (
            batch.behaviour_logp_N
            if self.student_signal == "cached"
            else declared(batch.student_logp_N).detach()
        )

    def teacher_minus_student(self, batch: TokenBatch) -> Tensor:
        """Compute log π_T - log π [N], detached."""
        return advantages.reverse_kl(self.signal_logp(batch), batch.teacher_logp_N)

    def bounded_gap(self, batch: TokenBatch) -> Tensor:
        """Compute the same within ±`signal_at_most`, [N]: what weights and selections take the
        size of, so that one token rules neither."""
        return self.bounded(self.teacher_minus_student(batch))[0]
