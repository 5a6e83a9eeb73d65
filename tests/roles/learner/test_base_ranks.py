"""Real ranks over gloo whose teacher and reference are the student's frozen base."""

import json
import uuid
from functools import cache

import pytest

from async_opd.toy.tokenizer import build_tokenizer
from tests.roles.learner import base_process
from tests.roles.learner.forked import run_ranks

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def train(tiny_lm, tmp_path_factory):
    """Takes a few steps, each rank in its own process, once for the same settings."""
    folder = tmp_path_factory.mktemp("ranks")
    model = folder / "model"
    tiny_lm().save_pretrained(model)
    build_tokenizer().save_pretrained(model)

    @cache
    def train(ranks, stage, objective, inside=True, **settings) -> list[dict]:
        job = dict(
            model=str(model),
            settings=dict(ranks=ranks, zero_stage=stage) | settings,
            objective=objective,
            inside=inside,
            meeting=str(folder / uuid.uuid4().hex),
        )
        outs = [folder / f"{uuid.uuid4().hex}.{rank}" for rank in range(ranks)]
        jobs = [job | dict(rank=rank, out=str(out)) for rank, out in enumerate(outs)]
        run_ranks(base_process, jobs)
        return [json.loads(out.read_text()) for out in outs]

    return train


@pytest.mark.parametrize(
    ("ranks", "stage", "objective", "settings"),
    [
        (1, 0, "egrsd", {}),
        (2, 2, "egrsd", {}),
        (2, 3, "egrsd", dict(gradient_checkpointing=True)),
        (2, 3, "g_opd", {}),
    ],
)
def test_ranks_that_score_train_as_by_a_pool(train, ranks, stage, objective, settings):
    """Though one of them has more to score than the other, and learns while the base stays."""
    (pool,) = train(1, 0, objective, inside=False)
    for rank in train(ranks, stage, objective, **settings):
        for got, step in zip(rank["metrics"], pool["metrics"], strict=True):
            assert got.pop("scoring_s") > 0
            assert got == pytest.approx(step, rel=1e-4, abs=2e-5)
        assert rank["says"] == pytest.approx(pool["says"], abs=1e-4)
        assert rank["unscored"] == [[]] * 3 and all(rank["trains"])
        assert rank["broken"] == "out of memory" and rank["says_again"] == rank["says"]
    losses = [step["loss"] for step in pool["metrics"]]
    assert len(set(losses)) == 3  # it has learned
