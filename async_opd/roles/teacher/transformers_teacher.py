"""An exact teacher on transformers. A plain class, which a
`runtime.actors.RoleActor` builds."""

import asyncio
import itertools
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from async_opd.core.aio import in_thread, within
from async_opd.core.errors import AsyncOpdError, CallFailed, WireError
from async_opd.core.foreign import foreign
from async_opd.core.precision import dtype_on
from async_opd.core.role_settings import ScorerSettings
from async_opd.core.vocabulary import exchanged
from async_opd.core.wire import Floats, Group, Ints, Needs
from async_opd.roles.models import causal_lm
from async_opd.roles.teacher.candidates import Answer, Outcome, answer, matched
from async_opd.roles.teacher.config import ReferenceConfig, TeacherConfig
from async_opd.roles.teacher.probe import probe_answer, probe_group
from async_opd.roles.teacher.scoring import Item, Scoring
from async_opd.roles.teacher.self_teacher import WeightEma, read_parameters


class TransformersTeacher:
    """Scores response positions in packed batches of at most `batch_tokens`; never holds [tokens,
    vocabulary]."""

    def __init__(
        self, settings: ScorerSettings, config: TeacherConfig | ReferenceConfig, needs: Needs
    ):
        """Load the model."""
        assert config.model  # a reference without one of its own is sent with the student's
        self._config = config
        self._needs = needs
        self._settings = settings
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = causal_lm.load(
            config.model,
            dtype_on(self._device.type == "cuda", config.dtype),
            self._device,
            trust_remote_code=settings.trust_remote_code,
        ).eval()
        embedding: Any = self._model.get_input_embeddings()
        self._scoring = Scoring(
            settings,
            needs,
            min(len(causal_lm.head(self._model).weight_VD), len(embedding.weight)),
            self._device,
            chunk_rows=config.head_chunk_rows,
        )
        # Penalties of the checkpoint's own would bend `greedy`.
        self._model.generation_config = GenerationConfig()
        self._waiting: list[tuple[Item, asyncio.Future[Outcome]]] = []
        self._arrived = asyncio.Condition()
        self._weights = asyncio.Lock()  # held by a forward, and by a change of the weights
        self._ema = WeightEma(
            self._model,
            config.ema_decay
            if isinstance(config, TeacherConfig) and config.update == "ema"
            else None,
        )
        self._serving: asyncio.Task | None = None

    async def score(self, group: Group) -> Answer:
        """Score each rollout of `group`, and say why one has no scores. Waits until a batch with
        them has been through the model."""
        if self._serving is None:
            self._serving = asyncio.create_task(self._serve())
        return answer(await asyncio.gather(*map(self._outcome, self._items(group))))

    async def probe(self) -> Floats:
        """What it says of a few tokens that are always the same, [T, F], to be compared with what
        its replicas say. They go through the model by themselves, as it is now."""
        group = probe_group(self._settings, self._scoring.logits, self._needs)
        async with self._weights:
            outcomes = await in_thread(_each, self.score_rollouts, self._items(group))
        return probe_answer(group, outcomes)

    def _items(self, group: Group) -> list[Item]:
        prompt = self._scoring.shown(group.prompt)
        return [(prompt, rollout) for rollout in group.rollouts]

    async def _outcome(self, item: Item) -> Outcome:
        """The scores of one rollout, or what went wrong with it alone. Waits for its batch."""
        prompt, rollout = item
        try:
            self._scoring.refuse(prompt, rollout)
            future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
            async with self._arrived:
                self._waiting.append((item, future))
                self._arrived.notify_all()
            outcome = await future
            return outcome if isinstance(outcome, AsyncOpdError) else matched(rollout, outcome)
        except WireError as e:
            return e

    async def load(self, folder: str) -> None:
        """Follow the student to its checkpoint in `folder`, between two forwards. Raises
        DataError."""
        student = await in_thread(read_parameters, folder, type(self._model))
        async with self._weights:
            await in_thread(self._ema.update, student)

    async def save(self, file: str) -> None:
        """Write a self-teacher's own weights, for a checkpoint."""
        async with self._weights:
            await in_thread(self._ema.save, Path(file))

    async def restore(self, file: str) -> None:
        """Be the self-teacher of that checkpoint."""
        async with self._weights:
            await in_thread(self._ema.restore, Path(file))

    async def _serve(self) -> None:
        """Wait for a request, then at most `flush_s` for a full batch; end only with the
        actor."""
        while True:
            async with self._arrived:
                await self._arrived.wait_for(lambda: self._waiting)
                with suppress(TimeoutError):
                    async with within(self._config.flush_s):
                        await self._arrived.wait_for(
                            lambda: self._tokens_waiting()[-1] >= self._config.batch_tokens
                        )
            if not (batch := self._take()):
                continue
            async with self._weights:
                outcomes = await in_thread(_each, self.score_rollouts, [item for item, _ in batch])
            for (_, future), outcome in zip(batch, outcomes, strict=True):
                if not future.done():  # its caller gave up
                    future.set_result(outcome)

    def _tokens_waiting(self) -> list[int]:
        """Count the tokens of the requests from the oldest up to each."""
        return list(
            itertools.accumulate(len(prompt) + len(r.ids) for (prompt, r), _ in self._waiting)
        )

    def _take(self) -> list[tuple[Item, asyncio.Future[Outcome]]]:
        """Take the oldest requests that fit one batch, at least one where anybody waits."""
        self._waiting = [each for each in self._waiting if not each[1].done()]
        count = max(1, sum(t <= self._config.batch_tokens for t in self._tokens_waiting()))
        batch, self._waiting = self._waiting[:count], self._waiting[count:]
        return batch

    def score_rollouts(self, items: list[Item]) -> list[Outcome]:
        """Score (prompt ids, rollout) pairs in one packed forward, as `Scoring` does."""
        return self._scoring.score(self._model, items)

    async def greedy(self, *prompts: Ints) -> list[Ints]:
        """Respond with the likeliest tokens, int32 each, to measure the teacher's accuracy."""
        async with self._weights:
            return await in_thread(self._greedy, prompts)

    def _greedy(self, prompts: tuple[Ints, ...]) -> list[Ints]:
        eos_ids = list(self._settings.eos_ids)
        width = max(map(len, prompts))
        ids = torch.tensor(
            [[0] * (width - len(p)) + p.tolist() for p in prompts], device=self._device
        )
        mask = torch.tensor(
            [[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self._device
        )
        # Generation keeps a cache and pads; packing does neither.
        self._model.set_attn_implementation("sdpa")
        out = self._model.generate(  # pyright: ignore[reportCallIssue] of a mixin
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=self._settings.max_new_tokens,
            do_sample=False,
            eos_token_id=eos_ids,
            pad_token_id=eos_ids[0],
            logits_processor=LogitsProcessorList([self._known]),
            stopping_criteria=self._stops_at(width),
        )
        self._model.set_attn_implementation(causal_lm.ATTENTION)
        answers = out[:, width:].cpu().numpy().astype(np.int32)
        ended = [np.flatnonzero(np.isin(ids, eos_ids)) for ids in answers]
        return [  # what is behind an end is padding
            exchanged(ids[: ends[0] + 1] if ends.size else ids, self._settings.ends_as)
            for ids, ends in zip(answers, ended, strict=True)
        ]

    def _stops_at(self, width: int) -> StoppingCriteriaList:
        """What ends each response, behind `width` tokens, once it spells one of the texts."""
        stops, remote = self._settings.stops, self._settings.trust_remote_code
        if not stops:
            return StoppingCriteriaList()
        decode = AutoTokenizer.from_pretrained(
            self._config.model, trust_remote_code=remote
        ).batch_decode
        most = max(len(stop.encode()) for stop in stops)  # tokens that spell one

        def spelled(ids_BL: torch.Tensor, scores: Any, **others: Any) -> torch.Tensor:
            ids_BT = ids_BL[:, max(width, ids_BL.shape[1] - most) :]
            texts = decode(ids_BT, skip_special_tokens=False)
            ended = [any(stop in text for stop in stops) for text in texts]
            return torch.tensor(ended, device=ids_BL.device)

        return StoppingCriteriaList([spelled])

    def _known(self, ids: torch.Tensor, logits_BV: torch.Tensor) -> torch.Tensor:
        """Leave out of what is generated the ids that the student has not."""
        if self._scoring.foreign is None:
            return logits_BV
        return logits_BV.masked_fill(self._scoring.foreign.marks_V, -torch.inf)


def _each(score: Callable[[list[Item]], list[Outcome]], items: list[Item]) -> list[Outcome]:
    """What `score` gives for `items` together; of those that go wrong in company, what it gives for
    each alone, so that only who is to blame fails."""
    try:
        with foreign(f"{items[0][1].id}: a forward of {len(items)} rollouts", CallFailed):
            outcomes = score(items)
    except AsyncOpdError as e:
        outcomes: list[Outcome] = [e] * len(items)
    if len(items) > 1:
        for place, outcome in enumerate(outcomes):
            if isinstance(outcome, AsyncOpdError):
                outcomes[place : place + 1] = _each(score, [items[place]])
    return outcomes
