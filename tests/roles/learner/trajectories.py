"""Trajectories as they reach a learner rank."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from async_opd.core.wire import Prompt, Rollout, Scores, Span, Verdict
from async_opd.roles.learner.batch import Trajectory

VOCABULARY = 40


def trajectory(
    prompt_tokens: int = 3,
    spans: Sequence[tuple[int, int]] = ((0, 4),),
    *,
    id: str = "a",
    seed: int = 0,
    truncated: bool = False,
    stop_tokens: int = 0,
    kept_kv: bool = False,
    reward: float | None = 1.0,
    behaviour: Sequence[float] | None = None,
    teacher: Sequence[float] | None = None,
    **scored: Any,
) -> Trajectory:
    """One whose `spans` are (version, tokens); ids and log-probs are random unless they are given,
    and `scored` are the fields of its scores beside the sampled log-probs."""
    random = np.random.default_rng(seed)
    ends = np.cumsum([tokens for _, tokens in spans]).tolist()
    ids = random.integers(VOCABULARY, size=prompt_tokens + ends[-1], dtype=np.int32)
    behaviour_logp, sampled_logp = (
        np.asarray(random.uniform(-4, -0.5, ends[-1]) if logp is None else logp, np.float32)
        for logp in (behaviour, teacher)
    )
    rollout = Rollout(
        id=id,
        ids=ids[prompt_tokens:],
        behaviour_logp=behaviour_logp,
        spans=tuple(
            Span(version=version, start=end - tokens, end=end)
            for (version, tokens), end in zip(spans, ends, strict=True)
        ),
        truncated=truncated,
        stop_tokens=stop_tokens,
        kept_kv=kept_kv,
    )
    return Trajectory(
        prompt=Prompt(id=id.partition("#")[0], ids=ids[:prompt_tokens], answer=""),
        rollout=rollout,
        scores=Scores(id=id, sampled_logp=sampled_logp, **scored),
        verdicts=(Verdict(id=id, reward=reward),),
        group_lengths=(len(rollout.ids),),
    )
