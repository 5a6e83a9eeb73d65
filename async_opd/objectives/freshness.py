"""Weight of a response by its age, and an anchor to the policy that wrote it (f-OPD,
arXiv:2605.17862); composes with every objective."""

from dataclasses import replace
from typing import Annotated, Literal

from msgspec import Meta, Struct, field

from async_opd.maths import Tensor, gates, importance, segments
from async_opd.objectives.token_batch import TokenBatch, TokenLoss, declared


class Freshness(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Weight w = max(0, f - ξ), f = exp(-α √D)/(τ + 1), of each response: τ its age in optimizer
    steps, D = KL(π‖π_behaviour) a token by which the student has moved on it since; and λ · D added
    to its loss, an anchor (Eq. 7-16; EXACT). Not mean-one: a response of weight 0 still counts in
    the mean, which the paper takes over responses (`mean_over = "sequences"`).

    RECONSTRUCTION, as the paper leaves open: w is detached; D is the mean over the response of κ =
    ρ log ρ - ρ + 1 from the sampled tokens' log-probs, where the paper has the whole vocabulary; τ
    is the mean lag of its tokens, or the largest; w multiplies ρ̃ and does not replace it; the
    coefficients, none of which the paper gives. Tokens that left the loss stay in D and τ. The
    anchor's gradient is λ ρ log ρ of a sampled token, so a sampled objective takes it as A - λ log
    ρ; any other as a second part of its loss. The paper's β √D^sup, of a teacher that moves, is not
    here, nor its refresh of the buffer.
    """

    alpha: Annotated[float, Meta(ge=0)] = 1.0  # per √nat; 0 leaves the age alone
    xi: Annotated[float, Meta(ge=0, lt=1)] = 0.0  # what is no fresher than this weighs nothing
    age: Literal["mean", "largest"] = "mean"  # of the lags of a response's tokens
    lam: Annotated[float, Meta(ge=0)] = field(default=0.1, name="lambda")  # of the anchor

    def weight(self, batch: TokenBatch) -> Tensor:
        """Compute w [N], detached."""
        lag_N = batch.lag_N.to(batch.behaviour_logp_N.dtype)
        if self.age == "mean":
            age_S = segments.means(lag_N, batch.segment_N, batch.trajectories)
        else:
            age_S = segments.largest(lag_N, batch.segment_N, batch.trajectories)
        drift_S = self._drift(batch)
        return gates.freshness(drift_S, age_S, alpha=self.alpha, least=self.xi)[batch.segment_N]

    def metrics(self, batch: TokenBatch) -> dict[str, Tensor]:
        """Compute w and D of each token's response."""
        return {"freshness": self.weight(batch), "moved": self._drift(batch)[batch.segment_N]}

    def anchor(self, logp: Tensor, behaviour_logp: Tensor) -> Tensor:
        """Compute λ log ρ, detached, which an advantage is lowered by; any shape."""
        return self.lam * importance.log_ratio(logp.detach(), behaviour_logp)

    def anchored(self, method: TokenLoss, batch: TokenBatch) -> TokenLoss:
        """Add λ κ to a loss without an advantage, by its gradient, sg[λ ρ log ρ] ∇log π."""
        logp_N = declared(batch.student_logp_N)
        rho_N = importance.ratio(logp_N.detach(), batch.behaviour_logp_N)
        factor_N = self.lam * rho_N
        return replace(
            method,
            loss_N=method.loss_N + rho_N * self.anchor(logp_N, batch.behaviour_logp_N) * logp_N,
            added_N=factor_N if method.added_N is None else factor_N.maximum(method.added_N),
        )

    def _drift(self, batch: TokenBatch) -> Tensor:
        """Compute D [S], nats a token, detached."""
        moved_N = importance.moved(declared(batch.student_logp_N).detach(), batch.behaviour_logp_N)
        return segments.means(moved_N, batch.segment_N, batch.trajectories)
