"""On-policy distillation by sampled-token reverse KL (IW-OPD Eq. 4-6, arXiv:2606.22600; status EXACT)."""

from typing import Annotated

from msgspec import Meta

from async_opd import maths
from async_opd.objectives.base import Objective, TokenBatch, TokenLoss


class Opd(Objective, tag="opd"):
    """ℓ = -sg[ρ · A] · log π,  A = log π_T - log π,  ρ = π / π_behaviour, all under the live student.

    At ρ untruncated its expectation is the gradient of KL(π‖π_T) whatever policy sampled the token (AsyncOPD 6.2).
    """

    truncate: Annotated[float, Meta(gt=0)] | None = None  # upper bound c of ρ; absent: plain ρ

    def loss(self, batch: TokenBatch) -> TokenLoss:
        """Loss [N]; zero signal where student = teacher.

        >>> import torch
        >>> logp = torch.tensor([-1.0]); zero = torch.zeros(1)
        >>> batch = TokenBatch(student_logp_N=logp, behaviour_logp_N=logp, teacher_logp_N=logp + 0.5,
        ...                    segment_N=zero.long(), reward_S=zero)
        >>> Opd().loss(batch).loss_N  # -(1 · 0.5) · -1
        tensor([0.5000])
        """
        rho_N = maths.importance.ratio(batch.student_logp_N, batch.behaviour_logp_N, truncate=self.truncate)
        advantage_N = (batch.teacher_logp_N - batch.student_logp_N).detach()
        return TokenLoss(-rho_N * advantage_N * batch.student_logp_N, rho_N)
