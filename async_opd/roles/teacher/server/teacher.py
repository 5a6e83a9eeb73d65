"""A teacher on a server that runs elsewhere, reached over HTTP. A plain class, which a
`runtime.actors.RoleActor` builds."""

from dataclasses import replace
from http import HTTPStatus

import numpy as np

from async_opd.core.aio import together
from async_opd.core.errors import ActorLost, AsyncOpdError, CallFailed, WireError
from async_opd.core.role_settings import ScorerSettings
from async_opd.core.vocabulary import exchanged, others
from async_opd.core.wire import Floats, Group, Ints, Needs, Rollout, Scores
from async_opd.roles.teacher.candidates import (
    Answer,
    Columns,
    Outcome,
    answer,
    candidates_of,
    matched,
    refuse_unknown_ids,
    scores_of,
)
from async_opd.roles.teacher.config import ReferenceConfig, TeacherConfig
from async_opd.roles.teacher.probe import probe_answer, probe_group
from async_opd.roles.teacher.server import vllm_routes
from async_opd.roles.teacher.server.client import Client
from async_opd.roles.teacher.server.served import READ, look, refuse

SPARE = 8  # likeliest ids asked for beyond K, where some are not the student's
MANY = 1024  # of ids not the student's, where the server does not say how many there are
UNSTEADY = 0.2  # nats (mean) by which a server may differ from itself: as much as bfloat16 does


class ServerTeacher:
    """Scores responses as the ends of prompts, whose log-probs a server gives at temperature 1 and
    without entropy.

    It gives them over all rows of the model's head, those that pad it among them, and of the
    candidates alone: the tail is what these leave of 1, and no less than TAIL_FLOOR. Ids that the
    student has not are left out of the likeliest here."""

    def __init__(
        self,
        settings: ScorerSettings,
        config: TeacherConfig | ReferenceConfig,
        needs: Needs,
        url: str,
        key: str | None,
        within_s: float,
    ):
        """`within_s` bounds a request once it is sent."""
        assert config.model  # a reference without one of its own is sent with the student's
        self._settings = settings
        self._model = config.model
        self._needs = needs
        self._url = url
        self._key = key
        self._within_s = within_s
        self._client = Client(settings.section, url, key, within_s=within_s)

    async def start(self) -> None:
        """Look at the server. Raises ConfigError for one that will not do, and CallFailed for one
        that does not score the same tokens in the same way twice."""
        settings = self._settings
        self._served = await look(
            self._url,
            self._key,
            self._model,
            timeout_s=self._within_s,
            section=settings.section,
        )
        refuse(self._served, settings, self._needs)
        self._logits = self._served.logits or _behind(settings)
        self._foreign = others(settings.vocabulary, self._logits)
        await self._refuse_unsteady()

    async def close(self) -> None:
        """Close the connections to the server."""
        await self._client.close()

    async def score(self, group: Group) -> Answer:
        """Score each rollout of `group`, each a request of its own, and say why it has no scores.
        Raises ActorLost when the server is gone, TimedOut and CallFailed for what it does to
        requests of any content."""
        return answer(await self._outcomes(group))

    async def probe(self) -> Floats:
        """What it says of a few tokens that are always the same, [T, F], to be compared with what
        its replicas say. Raises what `score` does."""
        group = probe_group(self._settings, self._logits, self._needs)
        return probe_answer(group, await self._outcomes(group))

    async def _refuse_unsteady(self) -> None:
        """Raise CallFailed where the probe and its own repeat differ, as they do where one URL
        stands for several models, or where none of it is scored."""
        group = probe_group(self._settings, self._logits, self._needs)
        outcomes = await self._outcomes(group)
        if all(isinstance(outcome, AsyncOpdError) for outcome in outcomes):
            raise CallFailed(f"{outcomes[0]}".removeprefix(f"{group.rollouts[0].id}: "))
        once, again = probe_answer(group, outcomes), await self.probe()
        gap = np.where(np.isnan(once) & np.isnan(again), 0, np.abs(once - again)).mean()
        if not gap <= UNSTEADY:
            raise CallFailed(
                f"{self._client.who}: answers the same probe in two ways: {gap:.2e} nats apart"
                f" (mean; allowed are {UNSTEADY:g})"
            )

    async def _outcomes(self, group: Group) -> list[Outcome]:
        prompt = group.prompt.ids if self._settings.as_student else group.prompt.shown_to_teacher
        return await together(*(self._outcome(prompt, r) for r in group.rollouts))

    async def _outcome(self, prompt: Ints, rollout: Rollout) -> Outcome:
        """The scores of `rollout`, or what is wrong with it or with the server's answer to it
        alone."""
        try:
            refuse_unknown_ids(prompt, rollout, self._logits, self._needs)
            return matched(rollout, await self._score(prompt, rollout))
        except WireError as e:
            return e

    async def _score(self, prompt: Ints, rollout: Rollout) -> Scores:
        try:
            columns = await self._read(prompt, rollout)
        except WireError as e:
            raise WireError(f"{rollout.id}: {self._client.who}: {e}") from e
        return scores_of(rollout, columns, self._settings, self._needs)

    async def _read(self, prompt: Ints, rollout: Rollout) -> Columns:
        """Ask until there are K likeliest ids that the student has."""
        served, pairs = self._served, self._settings.ends_as
        k = self._needs.teacher_topk
        at_ids = self._needs.teacher_at_student_ids > 0
        question = replace(
            served.question(
                np.concatenate([prompt, exchanged(rollout.ids, pairs)]), len(rollout.ids), 0
            ),
            candidates=exchanged(candidates_of(rollout), pairs) if at_ids else None,
        )
        most = self._most(k)
        asked = min(k + SPARE, most)
        while True:
            rows = await READ[served.engine](self._client, replace(question, k=asked))
            inside = np.minimum(rows.ids, self._logits - 1)
            known_TK = ~self._foreign[inside] & (rows.ids == inside)
            if known_TK.sum(1).min() >= k:
                break
            if asked == most:
                raise WireError(
                    f"of its {asked} likeliest ids fewer than {k} are the student's: serve it with"
                    " a larger --max-logprobs"
                )
            asked = min(2 * asked, most)
        first_TK = np.argsort(~known_TK, axis=1, kind="stable")[:, :k]
        return Columns(
            sampled_logp=rows.sampled,
            topk_ids=np.take_along_axis(rows.ids, first_TK, 1),
            topk_logp=np.take_along_axis(rows.logp, first_TK, 1),
            candidate_logp=rows.candidates,
        )

    def _most(self, k: int) -> int:
        """The likeliest ids that are ever asked for, so that `k` of them are the student's."""
        served = self._served
        strange = int(self._foreign.sum()) if served.logits else MANY
        bounds = [n for n in (served.most, served.logits) if n is not None]
        return min([k + strange, *bounds]) if k else 0

    async def greedy(self, *prompts: Ints) -> list[Ints]:
        """Respond with the likeliest tokens, int32 each, to measure the teacher's accuracy. Raises
        what `score` does, and CallFailed where the server has no route for it."""
        if self._served.engine != "vllm":
            raise CallFailed(f"{self._client.who}: only vLLM's server responds to token ids")
        return await together(*(self._response(ids) for ids in prompts))

    async def _response(self, ids: Ints) -> Ints:
        settings = self._settings
        sampling = vllm_routes.Likeliest(
            max_tokens=settings.max_new_tokens,
            eos_ids=settings.eos_ids,
            stops=settings.stops,
            among=settings.vocabulary if self._foreign.any() else None,
        )
        question = self._served.question(ids, 0, 0)
        try:
            response = await vllm_routes.respond(self._client, question, sampling)
        except WireError as e:
            raise WireError(f"{self._client.who}: {e}") from e
        return exchanged(response, settings.ends_as)

    async def check_health(self) -> None:
        """Raise ActorLost when the server, or the engine behind it, is gone, and TimedOut when it
        says nothing. One that is busy, or that has no route for it, lives."""
        reply = await self._client.get("/health")
        if reply.status >= HTTPStatus.INTERNAL_SERVER_ERROR and not reply.retry_after:
            raise ActorLost(f"{self._client.who}: says {reply.status} of its health")


def _behind(settings: ScorerSettings) -> int:
    """One more than the highest id of the model's own tokenizer, for a server that does not say how
    many logits the model has."""
    return max(stop for _, stop in settings.whole or settings.vocabulary)
