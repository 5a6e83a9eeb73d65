"""A fixed negative advantage on the least likely tokens, without a teacher (OPSA,
arXiv:2608.31046): a control."""

from async_opd.core.wire import Needs
from async_opd.maths import Tensor, advantages, selection
from async_opd.objectives.modifiers import Share
from async_opd.objectives.sampled import Sampled
from async_opd.objectives.token_batch import TokenBatch, declared


class Opsa(Sampled, frozen=True, tag="opsa"):
    """Trains the share of a response where the student finds its own token least likely, by A =
    -1/2 - (H - H_min)/(2 (H_max - H_min)), H the student's entropy there, or by -1/2 alone. All of
    it is SECOND-HAND.

    RECONSTRUCTION: the share is ⌈share · length⌉ of a response, masked tokens among them; the range
    of H is over the trained ones of the whole step; live log-probs, with ρ̃, which is essential: a
    constant without it pushes the student away from the policy that sampled. The mean is over all
    trained tokens.
    """

    share: Share = 0.2
    entropy: bool = True  # false: -1/2 alone

    def requirements(self) -> Needs:
        """Ask for the student's own entropy and its range over what is selected."""
        if not self.entropy:
            return Needs()
        return Needs(student_entropy=True, maxima=("opsa_most", "opsa_least"), first_pass=True)

    def selection(self, batch: TokenBatch) -> Tensor:
        """Choose the least likely tokens, bool [N]; at least one of each response."""
        return selection.lowest(
            self.signal_logp(batch), batch.segment_N, batch.trajectories, share=self.share
        )

    def token_statistics(self, batch: TokenBatch) -> dict[str, Tensor]:
        """Compute H and -H of what is selected."""
        if not self.entropy:
            return {}
        entropy_N, chosen_N = declared(batch.student_entropy_N).detach(), self.selection(batch)
        return {
            "opsa_most": entropy_N.where(chosen_N, -float("inf")),
            "opsa_least": (-entropy_N).where(chosen_N, -float("inf")),
        }

    def advantage(self, batch: TokenBatch) -> Tensor:
        """Compute A [N], detached."""
        if not self.entropy:
            return batch.behaviour_logp_N.new_full(batch.behaviour_logp_N.shape, -0.5)
        return advantages.fixed_negative(
            declared(batch.student_entropy_N).detach(),
            -batch.statistics["opsa_least"],
            batch.statistics["opsa_most"],
        )
