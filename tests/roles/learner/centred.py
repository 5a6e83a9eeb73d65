"""Objectives that need more than a micro-batch: the whole batch, or all the steps before."""

from async_opd.core.wire import Needs
from async_opd.maths import segments
from async_opd.objectives.opd import Opd


class Centred(Opd, tag="centred"):
    """Reverse KL against the mean advantage of the whole batch, in units of the largest one."""

    def requirements(self):
        return Needs(sums=("advantage",), maxima=("largest",), first_pass=True)

    def token_statistics(self, batch):
        advantage_N = batch.teacher_logp_N - batch.student_logp_N
        return dict(advantage=advantage_N, largest=advantage_N)

    def advantage(self, batch):
        statistics = batch.statistics
        mean = statistics["advantage"] / statistics["tokens"]
        return (super().advantage(batch) - mean) / (statistics["largest"] - mean)


class Remembering(Opd, tag="remembering"):
    """Reverse KL, and a tenth of the mean length of all responses of the steps before."""

    def requirements(self):
        return Needs(running=("length",))

    def trajectory_statistics(self, batch):
        return dict(length=segments.lengths(batch.segment_N, batch.trajectories))

    def advantage(self, batch):
        return super().advantage(batch) + 0.1 * batch.running["length"].mean
