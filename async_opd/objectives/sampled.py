"""What objectives of the sampled token share: ℓ = -sg[W · ρ̃ · A] · log π, and the ratios ρ̃ that
correct staleness."""

from dataclasses import replace
from typing import Annotated, Literal

from msgspec import Meta, Struct

from async_opd.core.wire import Needs
from async_opd.maths import Tensor, advantages, importance
from async_opd.objectives.base import Objective
from async_opd.objectives.modifiers import Bound, Range, check_bounds, refuse_change
from async_opd.objectives.reward import RUNNING, SHARES, Reward
from async_opd.objectives.token_batch import ComposedLoss, TokenBatch, TokenLoss, declared


class Importance(
    Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="importance", tag_field="tag"
):
    """ρ̃ detached: ρ of the token, of its sequence, or of its sequence's geometric mean, or 1; then
    truncated."""

    ratio: Literal["token", "sequence", "geometric", "none"] = "token"
    at_most: Bound | None = None  # min(ρ, c)
    between: Range | None = None  # ρ · 1[a ≤ ρ ≤ b]

    def __post_init__(self) -> None:
        check_bounds(self.at_most, self.between)
        if self.ratio == "none":
            refuse_change(self, "at_most", "ratio = 'none'")
            refuse_change(self, "between", "ratio = 'none'")

    def apply(
        self, batch: TokenBatch, logp: Tensor, behaviour_logp: Tensor, signal: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return (-sg[ρ̃ · signal] · log π, ρ̃) of the sampled token [N] or of M samples a position
        [N, M]."""
        factor = importance.truncate(
            self._ratio(batch, logp.detach(), behaviour_logp),
            at_most=self.at_most,
            between=self.between,
        )
        return -factor * signal * logp, factor

    def _ratio(self, batch: TokenBatch, logp: Tensor, behaviour_logp: Tensor) -> Tensor:
        if self.ratio == "none":
            return logp.new_ones(logp.shape)
        if self.ratio == "token":
            return importance.ratio(logp, behaviour_logp)
        of_sequence = {
            "sequence": importance.sequence_ratio,
            "geometric": importance.geometric_ratio,
        }
        return of_sequence[self.ratio](
            declared(batch.student_logp_N).detach(),
            batch.behaviour_logp_N,
            batch.segment_N,
            batch.trajectories,
            instead_NM=logp - behaviour_logp if logp.ndim == 2 else None,
        )


class Ppo(
    Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="ppo", tag_field="tag"
):
    """-min(ρ · A, clip(ρ, 1-ε, 1+ε) · A), gradient through ρ; for A < 0 no more than c · |A| by the
    dual clip."""

    clip: Annotated[float, Meta(gt=0, lt=1)] = 0.2
    dual_clip: Annotated[float, Meta(gt=1)] | None = None  # verl: 3.0

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

    correction: Importance | Ppo = Importance()
    # cached: the signal takes the behaviour policy's log-prob
    student_signal: Literal["live", "cached"] = "live"
    reward: Reward | None = None  # beside distillation; absent: distillation alone

    @property
    def metric_names(self) -> list[str]:
        """The names of what `loss` measures, the shares of a task reward among them."""
        return [*super().metric_names, *(SHARES if self.reward else ())]

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

    def loss(self, batch: TokenBatch) -> ComposedLoss:
        """Compose as every objective does, and measure the share of a task reward."""
        composed = super().loss(batch)
        if self.reward is None:
            return composed
        shares = self.reward.shares(self.reward.part(batch), self.advantage(batch))
        return replace(composed, metrics=composed.metrics | shares)

    def advantage(self, batch: TokenBatch) -> Tensor:
        """Compute A [N], detached: positive makes the token likelier; log π_T - log π."""
        return self.teacher_minus_student(batch)

    def weight(self, batch: TokenBatch) -> Tensor:
        """Compute the method's own W [N], detached."""
        return batch.behaviour_logp_N.new_ones(len(batch.behaviour_logp_N))

    def token_loss(self, batch: TokenBatch) -> TokenLoss:
        """Compute ℓ [N], by the correction."""
        advantage_N = self.advantage(batch)
        if self.reward:
            advantage_N = advantage_N + self.reward.part(batch)
        advantage_N, bounded_N = self.bounded(advantage_N)
        weight_N = self.weight(batch)
        loss_N, ratio_N = self.correction.apply(
            batch,
            declared(batch.student_logp_N),
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
