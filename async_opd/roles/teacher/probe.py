"""The probe of a scorer: tokens that are always the same, and what a replica says of them."""

from collections.abc import Sequence

import numpy as np

from async_opd.core.errors import AsyncOpdError
from async_opd.core.role_settings import ScorerSettings
from async_opd.core.vocabulary import listed
from async_opd.core.wire import Floats, Group, Needs, Prompt, Rollout, Span
from async_opd.roles.teacher.candidates import Outcome

RESPONSES = 4  # what a model cannot score of one leaves the others to compare
PROMPT, TOKENS = 4, 32  # of the prompt, and of each response, at most


def probe_group(settings: ScorerSettings, logits: int, needs: Needs) -> Group:
    """Make RESPONSES rollouts of one prompt, of random ids that the tokenizer and a model of so
    many logits have, with the candidates that `needs` wants scored."""
    random = np.random.default_rng(0)
    known = listed(settings.vocabulary)
    known = known[known < logits].astype(np.int32)
    prompt = min(PROMPT, settings.longest // 2)
    tokens = min(TOKENS, settings.longest - prompt)

    def drawn(*shape: int) -> np.ndarray:
        return random.choice(known, size=shape)

    k = needs.teacher_at_student_ids
    rollouts = [
        Rollout(
            id=f"probe#{sample}",
            ids=drawn(tokens),
            behaviour_logp=np.zeros(tokens, np.float32),
            spans=(Span(version=0, start=0, end=tokens),),
            truncated=True,
            candidate_ids=drawn(tokens, k) if k else None,
        )
        for sample in range(RESPONSES)
    ]
    return Group(prompt=Prompt(id="probe", ids=drawn(prompt), answer=""), rollouts=tuple(rollouts))


def probe_answer(group: Group, outcomes: Sequence[Outcome]) -> Floats:
    """What a replica says of each token of the probe, in nats: log-probs of the token, of the
    likeliest and of candidates, and the entropy, float32 [T, F]; of a rollout that it cannot score,
    NaN. The tail is what the others leave, and left out: rounding is all that a small one is."""
    blocks: list[np.ndarray] = []
    for rollout, scores in zip(group.rollouts, outcomes, strict=True):
        if isinstance(scores, AsyncOpdError):
            blocks.append(np.full((len(rollout.ids), 1), np.nan, np.float32))
            continue
        columns = [scores.sampled_logp[:, None], scores.topk_logp, scores.candidate_logp]
        columns += [] if scores.entropy is None else [scores.entropy[:, None]]
        blocks.append(np.concatenate([c for c in columns if c is not None], axis=1))
    width = max(block.shape[1] for block in blocks)
    return np.concatenate([np.broadcast_to(b, (len(b), width)) for b in blocks])
