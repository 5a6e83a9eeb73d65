"""A server on loopback that answers as vLLM's does, of a model that is a table, until a test tells
it to do otherwise."""

import json
import ssl
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from aiohttp import web

V = 40  # rows of the head
MODEL = "tables/forty"
LOGITS_VV = np.random.default_rng(7).normal(size=(V, V)) * 2  # of what follows each id
LOGP_VV = LOGITS_VV - np.log(np.exp(LOGITS_VV).sum(1, keepdims=True))

Answer = Callable[["Stub", web.Request, dict[str, Any]], Awaitable[web.StreamResponse | None]]


Route = Callable[["Stub", web.Request], Awaitable[web.Response]]


class Stub:
    """What the server is, and what it was asked: `rule` answers a request for log-probs before
    the table does, where it returns something."""

    def __init__(self) -> None:
        self.model = MODEL
        self.most = 20  # --max-logprobs
        self.longest = 512  # --max-model-len
        self.logits = False  # --logprobs-mode raw_logits
        self.processed = False  # log-probs follow the temperature
        self.owner = "vllm"
        self.healthy, self.retry_after = 200, ""
        self.rule: Answer | None = None
        self.bend: Callable[[dict[str, Any]], None] = lambda answer: None
        self.asked: list[dict[str, Any]] = []  # bodies
        self.keys: list[str | None] = []
        self.connections: set[Any] = set()
        self.busy = 0  # requests that are under way …
        self.busiest = 0  # … and how many there were at most
        self.url = ""

    async def models(self, request: web.Request) -> web.Response:
        self.keys.append(request.headers.get("Authorization"))
        card = {"id": self.model, "root": self.model, "max_model_len": self.longest}
        return web.json_response({"data": [card | {"owned_by": self.owner}]})

    async def health(self, request: web.Request) -> web.Response:
        headers = {"Retry-After": self.retry_after} if self.retry_after else None
        return web.Response(status=self.healthy, headers=headers)

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.asked.append(body)
        self.keys.append(request.headers.get("Authorization"))
        self.connections.add(request.transport)
        self.busy += 1
        self.busiest = max(self.busiest, self.busy)
        try:
            if self.rule and (other := await self.rule(self, request, body)):
                return other
            k = V if body["prompt_logprobs"] == -1 else body["prompt_logprobs"]
            if k > self.most:
                text = f"Requested prompt logprobs of {k}, which is greater than max allowed: "
                error = {"message": f"{text}{self.most} (parameter=prompt_logprobs, value={k})"}
                return web.json_response({"error": error | {"code": 400}}, status=400)
            answer = self.answer(body["prompt"], k, body["temperature"])
            self.bend(answer)
            return web.Response(text=json.dumps(answer), content_type="application/json")
        finally:
            self.busy -= 1

    def answer(self, ids: list[int], k: int, temperature: float) -> dict[str, Any]:
        """The table's answer, as vLLM writes it."""
        rows: list[Any] = [None]
        for before, token in pairwise(ids):
            row = self.row(before, temperature)
            likeliest = np.argsort(-row)[:k].tolist()
            entries = {token: row[token]} | {id: row[id] for id in likeliest}
            rows.append(
                {
                    str(id): {"logprob": float(logp), "rank": 1, "decoded_token": "x"}
                    for id, logp in entries.items()
                }
            )
        return {
            "id": "cmpl-1",
            "object": "text_completion",
            "model": self.model,
            "choices": [{"index": 0, "text": "x", "prompt_logprobs": rows}],
            "usage": {"prompt_tokens": len(ids)},
        }

    def row(self, before: int, temperature: float = 1.0) -> np.ndarray:
        """What it says of what follows an id, float64 [V]."""
        if self.logits:
            return LOGITS_VV[before]
        logits = LOGITS_VV[before] / (temperature if self.processed else 1)
        return logits - np.log(np.exp(logits).sum())

    async def generate(self, request: web.Request) -> web.Response:
        """SGLang's route, as its documentation has it."""
        body = await request.json()
        self.asked.append(body)
        ids, start, k = body["input_ids"], body["logprob_start_len"], body["top_logprobs_num"]
        sampled: list[Any] = [[None, ids[start], None]]
        top: list[Any] = [None]
        for before, token in pairwise(ids[start:]):
            row = self.row(before, body["sampling_params"]["temperature"])
            sampled.append([row[token], token, None])
            top.append([[row[id], id, None] for id in np.argsort(-row)[:k].tolist()])
        meta = {"input_token_logprobs": sampled} | ({"input_top_logprobs": top} if k else {})
        answer = {"text": "x", "meta_info": meta}
        self.bend(answer)
        return web.json_response(answer)


@asynccontextmanager
async def serving(
    port: int = 0,
    tls: ssl.SSLContext | None = None,
    models: Route | None = None,
    tokens: Route | None = None,
):
    """The stub, at its `url`, for as long as it is needed; with other `models`, and with a route
    for `tokens`, where they are given."""
    stub = Stub()
    app = web.Application(client_max_size=1 << 26)
    app.router.add_get("/v1/models", partial(models, stub) if models else stub.models)
    if tokens:
        app.router.add_post("/inference/v1/generate", partial(tokens, stub))
    app.router.add_get("/health", stub.health)
    app.router.add_post("/v1/completions", stub.completions)
    app.router.add_post("/generate", stub.generate)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port, ssl_context=tls)
    await site.start()
    host, port = runner.addresses[0][:2]
    stub.url = f"{'https' if tls else 'http'}://{host}:{port}"
    stub.runner = runner
    try:
        yield stub
    finally:
        await runner.cleanup()
