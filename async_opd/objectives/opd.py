"""On-policy distillation by sampled-token reverse KL (IW-OPD Eq. 4-6, arXiv:2606.22600; status
EXACT)."""

from async_opd.objectives.sampled import Sampled


class Opd(Sampled, frozen=True, tag="opd"):
    """ℓ = -sg[ρ · A] · log π,  A = log π_T - log π,  ρ = π / π_behaviour, all under the live
    student.

    At ρ untruncated its expectation is the gradient of KL(π‖π_T) whatever policy sampled the token
    (AsyncOPD 6.2).
    """
