"""Which ids vLLM samples and has log-probs over, and which it picks beside each token. Its workers
load this file by name.

vLLM sends the likeliest ids of a position along with its token, in the same row, where a request
asks for log-probs of so many. Other ids in their place share that row's way: what an update, a
preemption or an abort does to a token, it does to its candidates.

Only the first of vLLM's two model runners has a method of its sampler to put other ids in by,
`gather_logprobs`. The second calls a function of Triton kernels over logits, by a name that each of
its files has for itself; nothing of it runs without a GPU. `engine_args.pin_runner` chooses.

`B` requests of one step, `V` rows of the head, `K` candidates. Log-probs are of logits divided by
the temperature.
"""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from async_opd.core.errors import AsyncOpdError, SyncFailed
from async_opd.core.foreign import foreign
from async_opd.core.vocabulary import Ids, others


class Candidates:
    """What `worker_extension_cls` adds to a vLLM worker."""

    model_runner: Any  # the worker's
    weight_transfer_engine: Any  # the worker's
    _adapter: dict[str, Tensor]  # that has come, and has not taken its place

    def use_only(self, ids: Ids) -> None:
        """Give every other id the logit -∞ from now on, wherever logits are made: none is sampled,
        and log-probs are over `ids` alone."""
        without_V, model = self._others(ids), self.model_runner.model
        if without_V.any():
            model.compute_logits = partial(logits_of, model.compute_logits, without_V)

    def pick_among(self, ids: Ids) -> None:
        """Let the likeliest of a position be of these alone from now on; what log-probs are over
        stays as it is."""
        sampler = self.model_runner.sampler
        sampler.gather_logprobs = partial(
            with_likeliest, type(sampler).gather_logprobs, without_V=self._others(ids)
        )

    def sample_candidates(self) -> None:
        """Let `logprobs=K` of a request ask for K samples from now on, in the place of the K
        likeliest; `logprobs=0` for none, as ever."""
        sampler = self.model_runner.sampler
        sampler.gather_logprobs = partial(with_samples, type(sampler).gather_logprobs)

    def break_off_update(self) -> None:
        """Be ready for an update, wherever the last one has ended. A worker that did its part
        before another failed takes that update to be under way, and would refuse the next."""
        self._weight_update_active = False
        self.weight_transfer_engine.break_off()

    def begin_adapter(self) -> None:
        """Serve under an adapter that changes nothing, until the first one comes."""
        self.weight_transfer_engine.begin_adapter()

    def receive_adapter(self, update: dict[str, Any]) -> None:
        """Receive an adapter, and serve on as before."""
        engine = self.weight_transfer_engine
        self._adapter = engine.receive_adapter(engine.parse_update_info(update))

    def put_adapter(self) -> None:
        """Serve under the adapter that has come."""
        self.weight_transfer_engine.put_adapter(self._adapter)

    def put_back_adapter(self) -> None:
        """Serve under the adapter before that."""
        self.weight_transfer_engine.put_back_adapter()

    def attempt(self, method: str, *args: Any) -> str:
        """Call a method of the worker; returns what it raises, or "". Where one of several workers
        raises itself, vLLM leaves the answers of the others unread, and takes each for that to its
        next question."""
        try:
            with foreign(method, SyncFailed):
                getattr(self, method)(*args)
        except AsyncOpdError as e:
            logging.getLogger(__name__).exception("an update of the weights broke off")
            return f"{e}"
        return ""

    def _others(self, ids: Ids) -> Tensor:
        """Mark the ids of the head that are none of these, bool [V]."""
        runner = self.model_runner
        return torch.from_numpy(others(ids, runner.model_config.get_vocab_size())).to(runner.device)


def logits_of(compute: Callable, without_V: Tensor, *args: Any) -> Tensor | None:
    """Take what a model computes, [B, V], or None on a rank that has no logits."""
    logits_BV = compute(*args)
    return None if logits_BV is None else logits_BV.masked_fill_(without_V, -torch.inf)


def with_likeliest(
    gather: Callable, logp_BV: Tensor, k: int, token_ids: Tensor, *, without_V: Tensor
) -> Any:
    """Put the K likeliest ids that are not marked behind each token that vLLM's
    `gather(logp_BV, 0, token_ids)` gives, [B, 1]."""
    top = logp_BV.masked_fill(without_V, -torch.inf).topk(k)
    return _beside(gather(logp_BV, 0, token_ids), top.indices, top.values)


def with_samples(gather: Callable, logp_BV: Tensor, k: int, token_ids: Tensor) -> Any:
    """Put K independent samples, with replacement, of the distribution that the token itself was
    drawn from, behind each sampled token that vLLM's `gather(logp_BV, 0, token_ids)` gives,
    [B, 1]."""
    alone = gather(logp_BV, 0, token_ids)
    if k == 0:
        return alone
    ids_BK = torch.multinomial(logp_BV.exp(), k, replacement=True)
    return _beside(alone, ids_BK, logp_BV.gather(1, ids_BK))


def _beside(alone: Any, ids_BK: Tensor, logp_BK: Tensor) -> Any:
    """Put ids with their log-probs behind what vLLM gave of the tokens alone."""
    return alone._replace(
        logprob_token_ids=torch.cat([alone.logprob_token_ids, ids_BK.to(torch.int32)], 1),
        logprobs=torch.cat([alone.logprobs, logp_BK], 1),
    )
