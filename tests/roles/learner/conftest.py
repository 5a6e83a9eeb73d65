from collections.abc import Callable

import pytest
import torch

from async_opd.roles.learner.batch import MicroBatch, TrainingBounds, Trajectory, pack
from async_opd.roles.learner.step import Student
from async_opd.roles.models import causal_lm
from tests.roles.learner.trajectories import trajectory


@pytest.fixture
def sample() -> Callable[..., Trajectory]:
    """Makes a trajectory."""
    return trajectory


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
        train_stop=True,
    ) -> MicroBatch:
        return pack(
            list(trajectories),
            TrainingBounds(
                max_lag_steps=max_lag_steps,
                stale=stale,
                truncated=truncated,
                cap=cap,
                train_stop=train_stop,
            ),
            live=live,
            device=torch.device("cpu"),
        )

    return make


@pytest.fixture
def student(tiny_lm) -> Student:
    return Student(tiny_lm(attn_implementation=causal_lm.ATTENTION), temperature=0.7, chunk_rows=3)
