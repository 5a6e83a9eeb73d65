"""Log-probs of a request as columns of numbers, on their way from vLLM's engine to a role.

vLLM's own front end makes a list of every row: 0.4 s of Python for 16,384 tokens with 32 candidates
each, in the thread of the event loop. Here an engine's arrays are copied once. It is the same for
both of vLLM's model runners, which send the same message.

`T` rows so far, one a token; `K` ids beside it.
"""

from typing import Any

import numpy as np
from vllm.v1.engine import EngineCoreRequest, output_processor
from vllm.v1.engine.logprobs import LogprobsProcessor
from vllm.v1.outputs import LogprobsLists, LogprobsTensors

from async_opd.core.wire import Floats, Ints

ROWS = 64  # that there is room for at first


class LogprobColumns:
    """Rows of ids with their log-probs, the token itself before the K beside it. Those of a prompt
    begin at its second token: nothing comes before the first."""

    def __init__(self) -> None:
        """Begin with no rows."""
        self._rows = 0
        self._ids = np.empty((0, 0), np.int32)
        self._logp = np.empty((0, 0), np.float32)

    @property
    def ids(self) -> Ints:
        """Ids, int32 [T, 1 + K]."""
        return self._ids[: self._rows]

    @property
    def logp(self) -> Floats:
        """Log-probs, float32 [T, 1 + K]."""
        return self._logp[: self._rows]

    def append(self, ids: Ints, logp: Floats) -> None:
        """Copy rows, of one width always, behind those that are there."""
        until = self._rows + len(ids)
        if until > len(self._ids):
            room = (max(until, 2 * self._rows, min(ROWS, until * ROWS)), ids.shape[1])
            kept = self._ids, self._logp
            self._ids, self._logp = np.empty(room, np.int32), np.empty(room, np.float32)
            if self._rows:
                self._ids[: self._rows] = kept[0][: self._rows]
                self._logp[: self._rows] = kept[1][: self._rows]
        self._ids[self._rows : until] = ids
        self._logp[self._rows : until] = logp
        self._rows = until

    def __len__(self) -> int:
        """Count the rows."""
        return self._rows


class ColumnsProcessor(LogprobsProcessor):
    """What vLLM's front end keeps of a request's log-probs: columns, where they are asked for flat,
    all at once (`RequestOutputKind.FINAL_ONLY`) and without texts."""

    @classmethod
    def from_new_request(cls, tokenizer: Any, request: EngineCoreRequest) -> LogprobsProcessor:
        """Begin for a request, in vLLM's own way where it is not of those."""
        sampling = request.sampling_params
        if sampling is None or not sampling.flat_logprobs:
            return LogprobsProcessor.from_new_request(tokenizer, request)
        kept = super().from_new_request(None, request)
        columns: Any = LogprobColumns  # in the place of vLLM's lists
        kept.logprobs = None if kept.logprobs is None else columns()
        kept.prompt_logprobs = None if kept.prompt_logprobs is None else columns()
        return kept

    def _update_sample_logprobs(self, logprobs_lists: LogprobsLists) -> None:
        kept: Any = self.logprobs
        assert self.cumulative_logprob is not None
        _append(kept, logprobs_lists.logprob_token_ids, logprobs_lists.logprobs, self.num_logprobs)
        self.cumulative_logprob += sum(logprobs_lists.logprobs[:, 0].tolist())

    def _update_prompt_logprobs(self, prompt_logprobs_tensors: LogprobsTensors) -> None:
        kept: Any = self.prompt_logprobs
        _append(
            kept,
            prompt_logprobs_tensors.logprob_token_ids.numpy(),
            prompt_logprobs_tensors.logprobs.numpy(),
            self.num_prompt_logprobs,
        )


def keep_columns() -> None:
    """Have the front ends of this process's engines keep columns from now on."""
    front_end: Any = output_processor  # where it looks the class up for each request
    front_end.LogprobsProcessor = ColumnsProcessor


def _append(columns: LogprobColumns, ids: Ints, logp: Floats, k: int | None) -> None:
    """Append what a request of `k` ids beside each token asked for; -1: of all. A step's rows are
    as wide as the widest of its requests."""
    width = None if k is None or k < 0 else 1 + k
    columns.append(ids[:, :width], logp[:, :width])
