"""What a causal LM says of responses: prompts and responses packed to one forward, of which only
the response positions reach the head, cut into the scores of each rollout. Of a teacher's own
model, and of the learner's."""

from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from async_opd.core.errors import WireError
from async_opd.core.role_settings import ScorerSettings
from async_opd.core.vocabulary import exchanged
from async_opd.core.wire import Ints, Needs, Prompt, Rollout, Scores
from async_opd.maths.head import Without
from async_opd.maths.logprobs import Read, ReadOptions, read_logprobs
from async_opd.roles.models import causal_lm
from async_opd.roles.teacher.candidates import Outcome, candidates_of, refuse_unknown_ids

Item = tuple[Ints, Rollout]  # prompt ids, and what came after them


class Scoring:
    """How one scorer reads rollouts, whatever model it is."""

    def __init__(
        self,
        settings: ScorerSettings,
        needs: Needs,
        logits: int,
        device: torch.device,
        *,
        chunk_rows: int | None = None,
        head_float32: bool = False,
    ):
        """`logits`: ids that the model has a logit and an embedding for; it is on `device`. The
        rest is as in `LearnerConfig`."""
        self.section, self.logits = settings.section, logits
        self._settings, self._needs = settings, needs
        self._device = device
        self._chunk_rows, self._head_float32 = chunk_rows, head_float32
        # candidates and answers of its own are none of these
        self.foreign = Without.those_but(settings.vocabulary, logits, device)
        self._unused = settings.whole and Without.those_but(settings.whole, logits, device)

    def shown(self, prompt: Prompt) -> Ints:
        """Look up how the scorer reads `prompt`."""
        return prompt.ids if self._settings.as_student else prompt.shown_to_teacher

    def refuse(self, prompt: Ints, rollout: Rollout) -> None:
        """Raise WireError for what the model has no logit for, and for a rollout that has failed by
        itself."""
        refuse_unknown_ids(prompt, rollout, self.logits, self._needs)

    @torch.no_grad()
    def score(self, model: PreTrainedModel, items: list[Item]) -> list[Outcome]:
        """Score `items` in one packed forward of `model`, which is made where there are none, too.
        What is not finite is that rollout's error alone."""
        ids, rows = causal_lm.segments([(prompt, rollout.ids) for prompt, rollout in items])

        def tensor(parts: list[np.ndarray]) -> torch.Tensor:
            return torch.as_tensor(np.concatenate(parts), dtype=torch.int64, device=self._device)

        def read(parts: list[np.ndarray]) -> torch.Tensor:
            return tensor([exchanged(part, self._settings.ends_as) for part in parts])

        hidden_LD = causal_lm.hidden_states(model, tensor(ids), [len(part) for part in ids])
        head = causal_lm.head(model)._replace(without=self._unused, float32=self._head_float32)
        if not items:
            return []
        scored = read_logprobs(
            hidden_LD[tensor(rows)],
            head,
            read([r.ids for _, r in items]),
            ReadOptions(
                self._settings.temperature,
                self._chunk_rows,
                entropy=self._needs.teacher_entropy,
                topk=self._needs.teacher_topk,
                topk_without=self.foreign,
                tail=self._needs.tail,
            ),
            candidate_ids_NK=read([candidates_of(r) for _, r in items])
            if self._needs.teacher_at_student_ids
            else None,
        )
        return _split(scored, [r for _, r in items], self._settings.ends_as)


def _split(
    read: Read, rollouts: list[Rollout], ends_as: tuple[tuple[int, int], ...]
) -> list[Outcome]:
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


def _scores(id: str, fields: dict[str, Any]) -> Outcome:
    try:
        return Scores(id=id, **fields)
    except WireError as e:
        return e
