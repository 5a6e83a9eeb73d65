from collections.abc import Callable

import numpy as np
import pytest
import torch

from async_opd.core.wire import Prompt, Rollout, Scores, Span, Verdict
from async_opd.roles.learner.batch import MicroBatch, TrainingBounds, Trajectory, pack
from async_opd.roles.learner.step import Student
from async_opd.roles.models import causal_lm

VOCABULARY = 40


@pytest.fixture
def sample() -> Callable[..., Trajectory]:
    """Makes a trajectory: `spans` are (version, tokens); ids and log-probs are random unless
    given."""

    def make(
        prompt_tokens=3,
        spans=((0, 4),),
        *,
        id="a",
        seed=0,
        truncated=False,
        correct=True,
        behaviour=None,
        teacher=None,
        topk_ids=None,
        topk_logp=None,
        tail_logp=None,
        from_teacher=False,
    ) -> Trajectory:
        random = np.random.default_rng(seed)
        ends = np.cumsum([tokens for _, tokens in spans]).tolist()
        ids = random.integers(VOCABULARY, size=prompt_tokens + ends[-1], dtype=np.int32)
        logp = [
            random.uniform(-4, -0.1, ends[-1]) if x is None else x for x in (behaviour, teacher)
        ]
        rollout = Rollout(
            id=id,
            ids=ids[prompt_tokens:],
            behaviour_logp=np.asarray(logp[0], np.float32),
            spans=tuple(
                Span(version=v, start=end - n, end=end)
                for (v, n), end in zip(spans, ends, strict=True)
            ),
            truncated=truncated,
        )
        sampled_logp = np.asarray(logp[1], np.float32)
        scores = Scores(
            id=id,
            sampled_logp=sampled_logp,
            topk_ids=topk_ids,
            topk_logp=topk_logp,
            tail_logp=tail_logp,
        )
        prompt = Prompt(id=id, ids=ids[:prompt_tokens], answer="")
        return Trajectory(
            prompt=prompt,
            rollout=rollout,
            scores=None if from_teacher else scores,
            verdicts=(Verdict(id=id, correct=correct),),
        )

    return make


@pytest.fixture
def packed() -> Callable[..., MicroBatch]:
    """Packs trajectories at live version 0 with bound 4 unless told otherwise."""

    def make(
        *trajectories: Trajectory,
        live=0,
        max_lag_steps=4,
        stale="mask",
        truncated="train",
        cap=64,
    ) -> MicroBatch:
        return pack(
            list(trajectories),
            TrainingBounds(max_lag_steps=max_lag_steps, stale=stale, truncated=truncated, cap=cap),
            live=live,
            device=torch.device("cpu"),
        )

    return make


@pytest.fixture
def student(tiny_lm) -> Student:
    return Student(tiny_lm(attn_implementation=causal_lm.ATTENTION), temperature=0.7, chunk_rows=3)
