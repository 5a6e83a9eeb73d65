"""Ids of the behaviour policy at every visited prefix, picked where vLLM samples. Its workers load
this file by name.

vLLM sends the likeliest ids of a position along with the sampled token, in the same row. Other ids
in their place share that row's way: what an update, a preemption or an abort does to a token, it
does to its candidates.

`B` requests of one step, `V` vocabulary, `K` candidates. Log-probs are of logits divided by the
temperature.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor


class Candidates:
    """What `worker_extension_cls` adds to a vLLM worker."""

    model_runner: Any  # the worker's

    def return_candidates(self, which: Literal["likeliest", "sampled"], vocabulary: int) -> None:
        """Let `logprobs=K` of a request ask for K candidates of this kind from now on; `logprobs=0`
        for none, as ever."""
        sampler = self.model_runner.sampler
        sampler.gather_logprobs = partial(
            with_candidates, type(sampler).gather_logprobs, which=which, vocabulary=vocabulary
        )


def with_candidates(
    gather: Callable,
    logp_BV: Tensor,
    k: int,
    token_ids: Tensor,
    *,
    which: Literal["likeliest", "sampled"],
    vocabulary: int,
) -> Any:
    """Put K candidates behind each sampled token that vLLM's `gather(logp_BV, 0, token_ids)` gives,
    [B, 1].

    "likeliest": the K likeliest ids below `vocabulary`, the tokenizer's: those from there on are
    padding. "sampled": K independent samples, with replacement, of the distribution that the token
    itself was drawn from.
    """
    alone = gather(logp_BV, 0, token_ids)
    if k == 0:
        return alone
    ids_BK = (
        torch.multinomial(logp_BV.exp(), k, replacement=True)
        if which == "sampled"
        else logp_BV[:, :vocabulary].topk(k).indices
    )
    return alone._replace(
        logprob_token_ids=torch.cat([alone.logprob_token_ids, ids_BK.to(torch.int32)], 1),
        logprobs=torch.cat([alone.logprobs, logp_BV.gather(1, ids_BK)], 1),
    )
