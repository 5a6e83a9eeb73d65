"""What a server serves, looked at before a run depends on it, and whether that will do."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Literal

import msgspec
import numpy as np

from async_opd.core.errors import ActorLost, AsyncOpdError, CallFailed, ConfigError, WireError
from async_opd.core.role_settings import ScorerSettings
from async_opd.core.wire import Needs
from async_opd.roles.teacher.server import sglang_routes, vllm_routes
from async_opd.roles.teacher.server.answers import NoLogProbs, Question, Told, decoded
from async_opd.roles.teacher.server.client import Client

Engine = Literal["vllm", "sglang"]
Read = Callable[[Client, Question], Awaitable[Told]]

READ: dict[Engine, Read] = {"vllm": vllm_routes.read, "sglang": sglang_routes.read}
ANY_ID = 2**31 - 1  # above every id, of a head of unknown size
PROBED = 8  # tokens of a probe
LIKELIEST = 16  # ids beside each of them, at most
COOL = 0.5  # the temperature that log-probs must not follow
MOVED = 0.25  # of the size of log-probs …
ROUNDED = 0.2  # … and nats (mean) beside: what no rounding moves them by


class Card(msgspec.Struct):
    """A model that a server lists."""

    id: str
    root: str | None = None
    max_model_len: int | None = None
    owned_by: str = ""


class Models(msgspec.Struct):
    """What a server lists."""

    data: list[Card]


@dataclass(frozen=True, kw_only=True)
class Served:
    """What a server serves. Made by `look`."""

    url: str
    model: str  # as it is asked for
    names: frozenset[str]  # that the same model has there
    engine: Engine
    longest: int | None  # tokens of a sequence
    logits: int | None  # rows of the head
    most: int | None  # likeliest ids of one token; None: it names no bound
    no_given_ids: str  # why it does not score ids that it is given; "" where it does

    def question(self, ids: np.ndarray, tokens: int, k: int) -> Question:
        """Ask for the last `tokens` of `ids`, int32, and the `k` likeliest beside each."""
        return Question(
            model=self.model,
            names=self.names,
            ids=ids,
            tokens=tokens,
            k=k,
            logits=self.logits or ANY_ID,
        )


async def look(
    url: str, key: str | None, model: str, *, timeout_s: float, section: str = "teacher"
) -> Served:
    """Look at what the server at `url` serves under the name or the path `model`, and have it score
    a few tokens. `timeout_s` bounds each request. Raises ConfigError, which begins with
    `section`.urls, for a server that does not answer, has no such model, or whose log-probs of a
    prompt are none, or of another temperature than 1."""
    client = Client(f"{section}.urls", url, key, within_s=timeout_s)
    try:
        return await _looked(client, url, model)
    except ConfigError:
        raise
    except WireError as e:
        raise ConfigError(f"{client.who}: {e}") from e
    except AsyncOpdError as e:
        raise ConfigError(f"{e}") from e
    finally:
        await client.close()


async def _looked(client: Client, url: str, model: str) -> Served:
    cards = decoded(await client.ask("/v1/models"), Models).data
    card = next((c for c in cards if model in (c.id, c.root)), None)
    if card is None:
        names = client.shown(", ".join(repr(c.id) for c in cards)) or "nothing"
        raise ConfigError(
            f"{client.who}: serves {names}, and not model {model!r}: serve that, or tell the server"
            f" that it is called so: --served-model-name {model}"
        )
    engine: Engine = "sglang" if card.owned_by == "sglang" else "vllm"
    most, logits = await vllm_routes.extent(client, card.id) if engine == "vllm" else (None, None)
    served = Served(
        url=url,
        model=card.id,
        names=frozenset(c.id for c in cards if c is card or (c.root and c.root == card.root)),
        engine=engine,
        longest=card.max_model_len,
        logits=logits,
        most=most,
        no_given_ids=f"{engine} has no route for it",
    )
    await _refuse_other_numbers(client, served)
    if engine == "vllm":
        at_ids = replace(_probe(served, 0), candidates=np.ones((1, 1), np.int32), tokens=1)
        try:
            await vllm_routes.read(client, at_ids)
            served = replace(served, no_given_ids="")
        except (WireError, CallFailed, ActorLost) as e:
            served = replace(served, no_given_ids=f"{e}".removeprefix(f"{client.who}: "))
    return served


def _probe(served: Served, k: int) -> Question:
    tokens = max(1, min(PROBED, served.longest - 2)) if served.longest else PROBED
    ids = np.arange(1, tokens + 2, dtype=np.int32) % (served.logits or ANY_ID)
    return served.question(ids, tokens, k)


async def _refuse_other_numbers(client: Client, served: Served) -> None:
    """Raise ConfigError unless what the server tells are log-probs, those of the model itself."""
    bounds = [n for n in (served.most, served.logits) if n is not None]
    probe, read = _probe(served, min([LIKELIEST, *bounds])), READ[served.engine]
    flag = "; serve it with --logprobs-mode raw_logprobs" if served.engine == "vllm" else ""
    try:
        plain = await read(client, probe)
    except NoLogProbs as e:
        raise ConfigError(f"{client.who}: its log-probs of a prompt: {e}{flag}") from e
    least = np.exp(plain.logp, dtype=np.float64).sum(1).min()
    if served.logits and least < 0.5 * probe.k / served.logits:  # any K likeliest have K / V
        raise ConfigError(
            f"{client.who}: its log-probs of a prompt are none: the {probe.k} likeliest of"
            f" {served.logits} ids have a probability of {least:.2g}{flag}"
        )
    cool = await read(client, replace(probe, temperature=COOL))
    gap, size = np.abs(cool.sampled - plain.sampled).mean(), np.abs(plain.sampled).mean()
    if gap > MOVED * size + ROUNDED:
        raise ConfigError(
            f"{client.who}: its log-probs of a prompt follow the temperature of what is sampled"
            f" behind it (by {gap:.3g} nats for {COOL}){flag}"
        )


def refuse(served: Served, settings: ScorerSettings, needs: Needs) -> None:
    """Raise ConfigError for what a scorer of these `settings` needs and the server cannot do, with
    the server's flag that would help."""
    who = f"{settings.section}.urls, {served.url}"
    if settings.temperature != 1:
        raise ConfigError(
            f"{who}: rollout.temperature = {settings.temperature}: must be 1: a server's log-probs"
            " of a prompt ignore it"
        )
    if needs.teacher_entropy:
        raise ConfigError(f"{who}: the objective needs the exact entropy, which no server tells")
    room = settings.longest + 1  # a server samples a token behind every prompt
    if served.longest is not None and served.longest < room:
        raise ConfigError(
            f"{who}: its sequences have at most {served.longest} tokens; {room} are needed, one of"
            f" which it samples: serve it with --max-model-len {room}"
        )
    k = max(needs.teacher_topk, needs.teacher_at_student_ids)
    if served.most is not None and served.most < k:
        raise ConfigError(
            f"{who}: tells the log-probs of at most {served.most} ids a token; the objective needs"
            f" {k}: serve it with --max-logprobs {k}"
        )
    if needs.teacher_at_student_ids and served.no_given_ids:
        raise ConfigError(
            f"{who}: the objective has ids of the student's scored, which this server does not"
            f" do: {served.no_given_ids}: vLLM does on GPUs, served with --enable-scale-out"
        )
    ids = settings.vocabulary if settings.whole is None else settings.whole
    behind = max(stop for _, stop in ids)
    if served.logits is not None and served.logits < behind:
        raise ConfigError(
            f"{who}: serves a model of {served.logits} logits; the tokens of {settings.section}."
            f"model have ids up to {behind - 1}: it must be that model"
        )
