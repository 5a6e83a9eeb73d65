"""What SGLang's server tells of a prompt, by its route `/generate`. Tried against a stub of its
documented answer alone."""

from functools import partial
from typing import Any

import msgspec

from async_opd.core.errors import WireError
from async_opd.roles.teacher.server.answers import Question, Told, checked, decoded, refuse_rows
from async_opd.roles.teacher.server.client import MOST_BYTES, Client

ENTRY_BYTES = 256  # of one id with its log-prob

Entry = tuple[float | None, int, Any]  # log-prob, id, text


class Meta(msgspec.Struct):
    """What is told of the prompt from `logprob_start_len` on, whose first token has no log-prob
    there."""

    input_token_logprobs: list[Entry]
    input_top_logprobs: list[list[Entry] | None] = []


class Answer(msgspec.Struct):
    """The answer of `/generate`."""

    meta_info: Meta


async def read(client: Client, question: Question) -> Told:
    """Ask what the model says of the question's last tokens. Raises what `Client.ask` does, and
    WireError for an answer that is none to it."""
    body = {
        "input_ids": question.ids.tolist(),
        "sampling_params": {"temperature": question.temperature, "max_new_tokens": 1},
        "return_logprob": True,
        "logprob_start_len": len(question.ids) - question.tokens - 1,
        "top_logprobs_num": question.k,
    }
    most = MOST_BYTES + question.tokens * (question.k + 2) * ENTRY_BYTES
    return await client.read(partial(_told, question), "/generate", body, most)


def _told(question: Question, content: bytes) -> Told:
    """Read the answer to `question`."""
    meta = decoded(content, Answer).meta_info
    refuse_rows(len(meta.input_token_logprobs) - 1, question.tokens)
    asked = question.ids[-question.tokens :].tolist()
    sampled: list[float] = []
    for token, (logp, id, _) in zip(asked, meta.input_token_logprobs[1:], strict=True):
        if id != token or logp is None:
            raise WireError(f"its log-probs lack token {token}, which was asked for")
        sampled.append(logp)
    rows = meta.input_top_logprobs[1:] if question.k else [[]] * question.tokens
    refuse_rows(len(rows), question.tokens)
    return checked(question, sampled, [_row(row) for row in rows])


def _row(entries: list[Entry] | None) -> list[tuple[int, float]]:
    """Ids with their log-probs; one that has none is missing."""
    return [(id, logp) for logp, id, _ in entries or [] if logp is not None]
