"""What vLLM's server tells of a prompt: by its completions, or, at ids of the asker's own, by its
route for tokens, which has to be enabled and needs a GPU.

Tried with vLLM 0.32 on CPU; the route for tokens against vLLM's own classes of what it takes and
gives."""

import base64
import io
import re
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec
import numpy as np

from async_opd.core.errors import ActorLost, WireError
from async_opd.core.foreign import foreign
from async_opd.core.vocabulary import Ids, listed
from async_opd.core.wire import Floats, Ints
from async_opd.roles.teacher.server.answers import (
    Question,
    Told,
    checked,
    decoded,
    refuse_rows,
)
from async_opd.roles.teacher.server.client import MOST_BYTES, Client, Refused

COMPLETIONS = "/v1/completions"
TOKENS = "/inference/v1/generate"  # --enable-scale-out
# Written out, since a server has defaults of its own, from the checkpoint's generation_config.
PLAIN: dict[str, Any] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
ENTRY_BYTES = 512  # of one id with its log-prob, rank and text
ALL_BYTES = 1 << 28  # of every id of a head
# how vLLM refuses to tell of all ids of a head
BOUND = re.compile(r"prompt logprobs of (\d+)\D+max allowed: (\d+)")


class Entry(msgspec.Struct, gc=False):
    """What is told of one id: of a long answer there are a million."""

    logprob: float


class Choice(msgspec.Struct):
    """One of a completion's answers."""

    prompt_logprobs: list[msgspec.Raw] | None = None  # of the prompt's tokens, in order
    token_ids: list[int] | None = None


class Completion(msgspec.Struct):
    """The answer of COMPLETIONS."""

    model: str
    choices: list[Choice]


class Tokens(msgspec.Struct):
    """The answer of TOKENS."""

    model: str | None = None
    prompt_logprobs: list[msgspec.Raw] | None = None
    prompt_token_id_logprobs: str | None = None  # a .npy in base64, float32 [T, K]


_ROW = msgspec.json.Decoder(dict[int, Entry])


async def read(client: Client, question: Question) -> Told:
    """Ask what the model says of the question's last tokens. Raises what `Client.ask` does,
    ActorLost where another model answers, and WireError for an answer that is none to this."""
    sampling = PLAIN | {
        "temperature": question.temperature,
        "max_tokens": 1,
        "prompt_logprobs": question.k,
    }
    most = MOST_BYTES + len(question.ids) * (question.k + 2) * ENTRY_BYTES
    if question.candidates is None:
        body = {"model": question.model, "prompt": question.ids.tolist(), **sampling}
        path = COMPLETIONS
    else:
        sampling["prompt_logprob_token_ids"] = question.candidates.tolist()
        sampling["prompt_logprob_start"] = len(question.ids) - question.tokens - 1
        body = {
            "model": question.model,
            "token_ids": question.ids.tolist(),
            "sampling_params": sampling,
        }
        most += 16 * question.candidates.size
        path = TOKENS
    return await client.read(partial(_told, client, question), path, body, most)


def _told(client: Client, question: Question, content: bytes) -> Told:
    """Read the answer to `question`, of whichever route it was asked by."""
    if question.candidates is None:
        answer = decoded(content, Completion)
        if len(answer.choices) != 1:
            raise WireError(f"its answer has {len(answer.choices)} choices; one is asked for")
        rows, candidates = answer.choices[0].prompt_logprobs, None
    else:
        answer = decoded(content, Tokens)
        rows = answer.prompt_logprobs
        candidates = _array(answer.prompt_token_id_logprobs, question.candidates.shape)
    _refuse_other_model(client, question, answer.model)
    if rows is None:
        raise WireError("its answer has no prompt_logprobs")
    refuse_rows(len(rows), len(question.ids))
    return checked(question, *_rows(question, rows[len(rows) - question.tokens :]), candidates)


def _rows(
    question: Question, rows: list[msgspec.Raw]
) -> tuple[list[float], list[list[tuple[int, float]]]]:
    """Read the rows of the response's tokens: log-probs of these, and of the likeliest. A row has
    the token itself, and the likeliest, which it may be one of."""
    sampled: list[float] = []
    likeliest: list[list[tuple[int, float]]] = []
    for token, raw in zip(question.ids[-question.tokens :].tolist(), rows, strict=True):
        with foreign("its log-probs are not of the form asked for", WireError):
            row = _ROW.decode(raw)
        if token not in row:
            raise WireError(f"its log-probs lack token {token}, which was asked for")
        sampled.append(row[token].logprob)
        if len(row) > question.k:
            del row[token]
        likeliest.append([(id, entry.logprob) for id, entry in row.items()])
    return sampled, likeliest


async def extent(client: Client, model: str) -> tuple[int | None, int | None]:
    """Ask of how many ids the server would tell the log-prob, and how many the model's head has;
    None for what it does not say. It is asked for all: one that has a bound names both. Raises what
    `Client.ask` does."""
    body = PLAIN | {"model": model, "prompt": [1, 2], "max_tokens": 1, "prompt_logprobs": -1}
    try:
        content = await client.ask(COMPLETIONS, body, ALL_BYTES)
    except Refused as e:
        bound = BOUND.search(f"{e}")
        return (int(bound[2]), int(bound[1])) if bound else (None, None)
    rows = [choice.prompt_logprobs for choice in decoded(content, Completion).choices]
    if not (rows and rows[0] and len(rows[0]) == 2):
        raise WireError("its answer has no prompt_logprobs: it is no server of vLLM's")
    most = len(decoded(bytes(rows[0][1]), dict[int, Entry]))
    return most, most


@dataclass(frozen=True, kw_only=True)
class Likeliest:
    """How a response of likeliest tokens ends, and what it is of."""

    max_tokens: int
    eos_ids: tuple[int, ...]
    stops: tuple[str, ...]
    among: Ids | None  # ids that it may have; None: all


async def respond(client: Client, question: Question, sampling: Likeliest) -> Ints:
    """The response of likeliest tokens to the question's ids, int32, in whatever time it takes.
    Raises what `read` does but TimedOut."""
    body = PLAIN | {
        "model": question.model,
        "prompt": question.ids.tolist(),
        "temperature": 0.0,
        "max_tokens": sampling.max_tokens,
        "stop_token_ids": [*sampling.eos_ids],
        "stop": [*sampling.stops],
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "ignore_eos": True,  # of the server's own choice
        "allowed_token_ids": None if sampling.among is None else listed(sampling.among).tolist(),
        "return_token_ids": True,
    }
    most = MOST_BYTES + sampling.max_tokens * ENTRY_BYTES
    content = await client.ask(COMPLETIONS, body, most, as_long_as_it_takes=True)
    answer = decoded(content, Completion)
    _refuse_other_model(client, question, answer.model)
    ids = answer.choices[0].token_ids if answer.choices else None
    if not ids or min(ids) < 0 or max(ids) >= question.logits:
        raise WireError(f"its answer's token_ids must be ids < {question.logits}, at least one")
    return np.array(ids, np.int32)


def _refuse_other_model(client: Client, question: Question, model: str | None) -> None:
    """Raise ActorLost where another model answers: the server is not the one that it was."""
    if model not in question.names:
        raise ActorLost(
            f"{client.who}: answers as model {client.shown(repr(model))}; {question.model!r} was"
            " asked for"
        )


def _array(text: str | None, shape: tuple[int, ...]) -> Floats:
    """Read an array as the server sends it. Raises WireError where it is none of that shape."""
    with foreign("its prompt_token_id_logprobs are no array", WireError):
        array = np.load(io.BytesIO(base64.b64decode(text or "", validate=True)), allow_pickle=False)
    if array.shape != shape or array.dtype != np.float32:
        raise WireError(
            f"its prompt_token_id_logprobs are {array.dtype} {array.shape}: must be float32 {shape}"
        )
    return array
