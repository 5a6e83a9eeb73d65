"""An objective that needs the whole batch before its loss. No direct subclass: those are what a run lists."""

import torch

from async_opd.objectives.base import TokenLoss
from async_opd.objectives.opd import Opd
from async_opd.wire import Needs


class Centred(Opd, tag="centred"):
    """Reverse KL against the mean advantage of the whole batch, in units of the largest one."""

    def needs(self):
        return Needs(sums=("advantage", "tokens"), maxima=("largest",))

    def statistics(self, batch):
        advantage_N = batch.teacher_logp_N - batch.student_logp_N
        return dict(advantage=advantage_N, tokens=torch.ones_like(advantage_N), largest=advantage_N)

    def loss(self, batch):
        found = batch.statistics
        mean = found["advantage"] / found["tokens"]
        advantage_N = (batch.teacher_logp_N - batch.student_logp_N).detach()
        return TokenLoss(-(advantage_N - mean) / (found["largest"] - mean) * batch.student_logp_N, advantage_N)
