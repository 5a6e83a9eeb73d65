"""An exact teacher on transformers. A plain class, which a
`runtime.actors.RoleActor` builds."""

import asyncio
import itertools
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from async_opd.core.errors import WireError
from async_opd.core.role_settings import ScorerSettings
from async_opd.core.vocabulary import exchanged
from async_opd.core.wire import Group, Ints, Needs, Rollout, Scores
from async_opd.maths.head import Without
from async_opd.maths.logprobs import Read, ReadOptions, read_logprobs
from async_opd.roles.models import causal_lm
from async_opd.roles.teacher.candidates import candidates_of, matched, refuse_unknown_ids
from async_opd.roles.teacher.config import ReferenceConfig, TeacherConfig
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
            config.model, config.dtype, self._device, trust_remote_code=settings.trust_remote_code
        ).eval()
        self._logits = len(causal_lm.head(self._model).weight_VD)
        self._foreign = Without.those_but(settings.vocabulary, self._logits, self._device)
        self._unused = settings.whole and Without.those_but(
            settings.whole, self._logits, self._device
        )
        # Penalties of the checkpoint's own would bend `greedy`.
        self._model.generation_config = GenerationConfig()
        self._waiting: list[tuple[np.ndarray, Rollout, asyncio.Future]] = []
        self._arrived = asyncio.Condition()
        self._weights = asyncio.Lock()  # held by a forward, and by a change of the weights
        self._ema = WeightEma(
            self._model,
            config.ema_decay
            if isinstance(config, TeacherConfig) and config.update == "ema"
            else None,
        )
        self._serving: asyncio.Task | None = None

    async def score(self, group: Group) -> tuple[Scores, ...]:
        """Score each rollout of `group`. Waits until a batch with them has been through the model.
        Raises WireError for an id that it has no logit of."""
        if self._serving is None:
            self._serving = asyncio.create_task(self._serve())
        prompt = group.prompt.ids if self._settings.as_student else group.prompt.shown_to_teacher
        refuse_unknown_ids(group, self._logits, self._needs)
        futures = [asyncio.get_running_loop().create_future() for _ in group.rollouts]
        async with self._arrived:
            self._waiting += [
                (prompt, rollout, f) for rollout, f in zip(group.rollouts, futures, strict=True)
            ]
            self._arrived.notify_all()
        return matched(group, tuple(await asyncio.gather(*futures)))

    async def load(self, folder: str) -> None:
        """Follow the student to its checkpoint in `folder`, between two forwards. Raises
        DataError."""
        student = await asyncio.to_thread(read_parameters, folder, type(self._model))
        async with self._weights:
            await asyncio.to_thread(self._ema.update, student)

    async def save(self, file: str) -> None:
        """Write a self-teacher's own weights, for a checkpoint."""
        async with self._weights:
            await asyncio.to_thread(self._ema.save, Path(file))

    async def restore(self, file: str) -> None:
        """Be the self-teacher of that checkpoint."""
        async with self._weights:
            await asyncio.to_thread(self._ema.restore, Path(file))

    async def _serve(self) -> None:
        """Wait for a request, then at most `flush_s` for a full batch; end only with the
        actor."""
        while True:
            async with self._arrived:
                await self._arrived.wait_for(lambda: self._waiting)
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._config.flush_s):
                        await self._arrived.wait_for(
                            lambda: self._tokens_waiting()[-1] >= self._config.batch_tokens
                        )
            batch = self._take()
            try:
                async with self._weights:
                    scored = await asyncio.to_thread(
                        self.score_rollouts, [(prompt, rollout) for prompt, rollout, _ in batch]
                    )
            except Exception as error:
                # It belongs to these requests: their callers get it, the next batch goes on.
                scored = [error] * len(batch)
            for (_, _, future), scores in zip(batch, scored, strict=True):
                if future.done():  # its caller gave up
                    continue
                if isinstance(scores, Exception):
                    future.set_exception(scores)
                else:
                    future.set_result(scores)

    def _tokens_waiting(self) -> list[int]:
        """Count the tokens of the requests from the oldest up to each."""
        return list(
            itertools.accumulate(len(prompt) + len(r.ids) for prompt, r, _ in self._waiting)
        )

    def _take(self) -> list[tuple[np.ndarray, Rollout, asyncio.Future]]:
        """Take the oldest requests that fit one batch, at least one."""
        count = max(1, sum(t <= self._config.batch_tokens for t in self._tokens_waiting()))
        batch, self._waiting = self._waiting[:count], self._waiting[count:]
        return batch

    @torch.no_grad()
    def score_rollouts(self, items: list[tuple[np.ndarray, Rollout]]) -> list[Scores | WireError]:
        """Score (prompt ids, rollout) pairs in one packed forward; only response positions reach
        the LM head. What is not finite is that rollout's error alone."""
        ids, rows = causal_lm.segments([(prompt, rollout.ids) for prompt, rollout in items])

        def tensor(parts: list[np.ndarray]) -> torch.Tensor:
            return torch.as_tensor(np.concatenate(parts), dtype=torch.int64, device=self._device)

        def read(parts: list[np.ndarray]) -> torch.Tensor:
            return tensor([exchanged(part, self._settings.ends_as) for part in parts])

        hidden_LD = causal_lm.hidden_states(self._model, tensor(ids), [len(part) for part in ids])
        scored = read_logprobs(
            hidden_LD[tensor(rows)],
            causal_lm.head(self._model)._replace(without=self._unused),
            read([r.ids for _, r in items]),
            ReadOptions(
                self._settings.temperature,
                self._config.head_chunk_rows,
                entropy=self._needs.teacher_entropy,
                topk=self._needs.teacher_topk,
                topk_without=self._foreign,
                tail=self._needs.tail,
            ),
            candidate_ids_NK=read([candidates_of(r) for _, r in items])
            if self._needs.teacher_at_student_ids
            else None,
        )
        return _split(scored, [r for _, r in items], self._settings.ends_as)

    async def greedy(self, *prompts: Ints) -> list[Ints]:
        """Respond with the likeliest tokens, int32 each, to measure the teacher's accuracy."""
        async with self._weights:
            return await asyncio.to_thread(self._greedy, prompts)

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
        return list(exchanged(answers, self._settings.ends_as))

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
        if self._foreign is None:
            return logits_BV
        return logits_BV.masked_fill(self._foreign.marks_V, -torch.inf)


def _split(
    read: Read, rollouts: list[Rollout], ends_as: tuple[tuple[int, int], ...]
) -> list[Scores | WireError]:
    """Cut what was read of a batch into the scores of its rollouts."""
    columns = {
        "sampled_logp": read.sampled_N,
        "topk_ids": read.topk_ids_NK,
        "topk_logp": read.topk_NK,
        "entropy": read.entropy_N,
        "candidate_logp": read.candidates_NK,
        "tail_logp": read.tail_N,
    }
    if read.topk_ids_NK is not None:
        columns["topk_ids"] = torch.from_numpy(exchanged(read.topk_ids_NK.cpu().numpy(), ends_as))
    lengths = [len(rollout.ids) for rollout in rollouts]
    parts = {
        name: [
            part.numpy().astype(np.int32 if name == "topk_ids" else np.float32)
            for part in column.cpu().split(lengths)
        ]
        for name, column in columns.items()
        if column is not None
    }
    return [
        _scores(rollout.id, {name: column[i] for name, column in parts.items()})
        for i, rollout in enumerate(rollouts)
    ]


def _scores(id: str, fields: dict[str, Any]) -> Scores | WireError:
    try:
        return Scores(id=id, **fields)
    except WireError as e:
        return e
