from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from async_opd.roles.rollout.vllm_candidates import Candidates

LOGP_BV = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.5, 0.0, 0.5, 0.0]]).log()


class Columns(NamedTuple):
    """vLLM's answer: a row for each request."""

    logprob_token_ids: torch.Tensor
    logprobs: torch.Tensor
    selected_token_ranks: torch.Tensor


class Sampler:
    @staticmethod
    def gather_logprobs(logp_BV, k, token_ids):
        assert k == 0
        return Columns(
            token_ids[:, None].int(), logp_BV.gather(1, token_ids[:, None]), torch.tensor([7, 8])
        )


@pytest.fixture(params=[1, 2], ids=["once", "twice"])
def columns(request):
    """Columns for K samples behind the sampled ids 2 and 0; asked for once, or twice."""

    def answer(k):
        worker = Candidates()
        worker.model_runner = Sampler()
        worker.model_runner.sampler = Sampler()
        for _ in range(request.param):
            worker.sample_candidates()
        return worker.model_runner.sampler.gather_logprobs(
            LOGP_BV, k, token_ids=torch.tensor([2, 0])
        )

    return answer


def test_samples_follow_the_probabilities_of_their_row(columns):
    torch.manual_seed(0)
    ids, logp, ranks = columns(100_000)
    assert ids[:, 0].tolist() == [2, 0]
    assert ids.dtype == torch.int32
    assert torch.equal(logp, LOGP_BV.gather(1, ids.long()))
    assert ranks.tolist() == [7, 8]  # of the sampled token, as vLLM gave it
    share = torch.stack([row.bincount(minlength=4) for row in ids[:, 1:]]) / 100_000
    # six standard deviations of a share of 0.4: 0.0093
    assert (share - LOGP_BV.exp()).abs().max() < 0.01


def test_a_request_without_candidates_gets_what_vllm_gives(columns):
    ids, logp, _ = columns(0)
    assert ids.tolist() == [[2], [0]]
    assert torch.equal(logp, LOGP_BV.gather(1, ids.long()))


class Model:
    """In the place of vLLM's: one that has logits, and one of a rank that has none."""

    def __init__(self, logits):
        self.logits = logits

    def compute_logits(self, hidden):
        return None if self.logits is None else self.logits.clone()


def worker(logits=None, size=4) -> Candidates:
    made = Candidates()
    runner = Sampler()
    runner.sampler, runner.model, runner.device = Sampler(), Model(logits), torch.device("cpu")
    runner.model_config = SimpleNamespace(get_vocab_size=lambda: size)
    made.model_runner = runner
    return made


def test_logits_are_of_known_ids_alone_wherever_they_are_made():
    logits = torch.tensor([[1.0, 9.0, 2.0, 9.0]])
    one = worker(logits)
    one.use_only(((0, 1), (2, 3)))
    got = one.model_runner.model.compute_logits(None).softmax(-1)
    torch.testing.assert_close(got, torch.tensor([[0.268941, 0, 0.731059, 0]]))  # 1 / (1 + e)
    nothing = worker()
    nothing.use_only(((0, 1), (2, 3)))
    assert nothing.model_runner.model.compute_logits(None) is None
    whole = worker(logits)
    whole.use_only(((0, 4),))
    assert torch.equal(whole.model_runner.model.compute_logits(None), logits)


def test_the_likeliest_are_picked_among_known_ids_and_log_probs_stay_as_they_are():
    one = worker()
    one.pick_among(((0, 2),))
    ids, logp, ranks = one.model_runner.sampler.gather_logprobs(LOGP_BV, 1, torch.tensor([2, 0]))
    assert ids.tolist() == [[2, 1], [0, 0]] and ids.dtype == torch.int32
    assert torch.equal(logp, LOGP_BV.gather(1, ids.long()))
    assert ranks.tolist() == [7, 8]
