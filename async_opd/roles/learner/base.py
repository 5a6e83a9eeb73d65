"""The student as it was before its first step: its adapters off, in the learner's own ranks, the
scorer of what no pool scores."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import torch
from msgspec.structs import replace
from torch import Tensor
from transformers import PreTrainedConfig

from async_opd.core.errors import AsyncOpdError, WireError, first_line
from async_opd.core.role_settings import LearnerSettings
from async_opd.core.wire import Group, LearnerShare, Needs, Scores, Unscored
from async_opd.maths.packing import plan
from async_opd.roles.learner.batch import Columns
from async_opd.roles.learner.config import LearnerConfig
from async_opd.roles.teacher.candidates import Outcome
from async_opd.roles.teacher.scoring import Item, Scoring

Pair = tuple[int, int]  # index of a group, and sample
Reduce = Callable[[Tensor, str], None]  # as in `step`


@dataclass(frozen=True)
class BaseBatch:
    """Prompts with their rollouts for one forward of the base; none for a rank that only joins
    in."""

    scoring: Scoring
    items: list[Item]


class Scored(NamedTuple):
    """A rank's part of a step, less what the base could not score, and its scores of the rest."""

    share: LearnerShare
    scores: tuple[Columns, ...]
    references: tuple[Columns, ...]
    unscored: tuple[Unscored, ...] = ()
    metrics: Mapping[str, float] = MappingProxyType({})


class Base:
    """Teachers and reference of one rank that are the frozen base. Every rank makes as many
    forwards of it: under ZeRO-3 they are collective."""

    def __init__(
        self,
        settings: LearnerSettings,
        config: LearnerConfig,
        needs: Needs,
        model: PreTrainedConfig,
        device: torch.device,
    ):
        """Scores are what `needs` asks of a teacher, read as the student's log-probs are, in
        forwards of at most a micro-batch's tokens. `model` is the config of the base."""
        make = partial(
            Scoring,
            logits=model.get_text_config().vocab_size,
            device=device,
            chunk_rows=config.head_chunk_rows,
            head_float32=config.head_float32,
        )
        self._teachers = {name: make(each, needs) for name, each in settings.teachers.items()}
        self._reference = settings.reference and make(settings.reference, Needs())
        self._tokens, self._device = config.micro_batch_tokens, device

    @torch.no_grad()
    def score(
        self,
        module: Callable[[BaseBatch], list[Outcome]],
        all_reduce: Reduce,
        share: LearnerShare,
        groups: tuple[Group, ...],
        scores: tuple[Columns, ...],
        references: tuple[Columns, ...] = (),
    ) -> Scored:
        """Score what of `share` is the base's to score, by `module`, which holds it; the columns
        are as in `LearnerRank.step`. A rollout that it cannot score is in no micro-batch of what is
        returned. Collective. Raises WireError for a group whose teacher is another."""
        for prompt in (groups[g].prompt for g in share.by_learner):
            if prompt.teacher not in self._teachers:
                raise WireError(
                    f"{prompt.id}: has no scores, nor is its teacher the student's base"
                )
        if not (self._teachers or self._reference):
            return Scored(share, scores, references)
        start = time.perf_counter()
        answers = partial(self._answers, module, all_reduce, groups)
        pairs = [pair for micro in share.micro_batches for pair in micro]
        scored: dict[Pair, Scores | Unscored] = {}
        for name, scoring in self._teachers.items():
            shown = [p for p in pairs if p[0] in share.by_learner]
            scored |= answers(scoring, [p for p in shown if groups[p[0]].prompt.teacher == name])
        referred: dict[Pair, Scores | Unscored] = {}
        if self._reference:
            students = [p for p in pairs if scores[p[0]] or p[0] in share.by_learner]
            referred = answers(self._reference, students)
        unscored = {
            pair: each
            for pair, each in (*referred.items(), *scored.items())
            if isinstance(each, Unscored)
        }
        left = [tuple(p for p in micro if p not in unscored) for micro in share.micro_batches]
        seconds = torch.tensor(time.perf_counter() - start, device=self._device)
        all_reduce(seconds, "max")
        return Scored(
            replace(share, micro_batches=tuple(left)),
            _filled(scores, groups, scored),
            _filled(references or (None,) * len(groups), groups, referred),
            tuple(unscored.values()),
            {"scoring_s": seconds.item()},
        )

    def _answers(
        self,
        module: Callable[[BaseBatch], list[Outcome]],
        all_reduce: Reduce,
        groups: tuple[Group, ...],
        scoring: Scoring,
        pairs: list[Pair],
    ) -> dict[Pair, Scores | Unscored]:
        """Have `pairs` scored, in as many forwards as the rank with the most needs."""
        items: dict[Pair, Item] = {}
        outcomes: dict[Pair, Outcome] = {}
        for g, s in pairs:
            prompt, rollout = scoring.shown(groups[g].prompt), groups[g].rollouts[s]
            try:
                scoring.refuse(prompt, rollout)
                items[g, s] = prompt, rollout
            except WireError as e:
                outcomes[g, s] = e
        asked = list(items)
        lengths = [len(prompt) + len(rollout.ids) for prompt, rollout in items.values()]
        (planned,) = plan(lengths, ranks=1, tokens=self._tokens, width=1)
        batches = [batch for batch in planned if batch]
        most = torch.tensor(len(batches), device=self._device)
        all_reduce(most, "max")
        for batch in batches + [[]] * (int(most) - len(batches)):
            batched = [asked[i] for i in batch]
            answered = module(BaseBatch(scoring, [items[pair] for pair in batched]))
            outcomes |= zip(batched, answered, strict=True)
        return {
            (g, s): Unscored(
                id=groups[g].prompt.id, sample=s, role=scoring.section, why=first_line(outcome)
            )
            if isinstance(outcome, AsyncOpdError)
            else outcome
            for (g, s), outcome in outcomes.items()
        }


def _filled(
    columns: tuple[Columns, ...],
    groups: tuple[Group, ...],
    answers: Mapping[Pair, Scores | Unscored],
) -> tuple[Columns, ...]:
    """Put what was answered in the place of columns that are not there."""
    asked = {g for g, _ in answers}
    return tuple(
        tuple(
            each if isinstance(each := answers.get((g, s)), Scores) else None
            for s in range(len(group.rollouts))
        )
        if g in asked
        else column
        for g, (column, group) in enumerate(zip(columns, groups, strict=True))
    )
