"""A run without teachers beside the learner: it scores what it trains."""

import asyncio

import msgspec
import pytest
from msgspec.structs import replace

from async_opd.config.load import load
from async_opd.core.errors import TooManyDropped
from async_opd.core.run_dir import CONFIG
from async_opd.core.wire import GroupMeta, Unscored
from async_opd.telemetry.metrics import Meter
from async_opd.tools.audit.books import audit
from tests.driver.test_train_loop import SMALL, run
from tests.simulated.roles import Pace, RecordingLearner, SimulatedGenerator

INSIDE = (
    "student.lora.rank=2",
    "teacher.model=toy:student",
    "teacher.backend=learner",
    "rollout.samples_per_prompt=2",
)
SCORING_S = 0.01


class Pairs(SimulatedGenerator):
    """Two samples of each prompt."""

    async def _respond(self, prompt, first):
        meta, group = await super()._respond(prompt, first)
        return GroupMeta(
            id=meta.id, prompt_len=1, spans=meta.spans * 2, truncated=(False, False)
        ), group


class Scoring(RecordingLearner):
    """Scores what it trains, but for the samples `fails(number of the prompt)` of each prompt."""

    def __init__(self, fails=lambda prompt: ()):
        super().__init__(Pace(token_s=0, step_s=0.02))
        self._fails, self.groups = fails, []

    async def step(self, groups):
        self.groups += groups
        result = await super().step(groups)
        unscored = [
            Unscored(id=each.prompt.id, sample=sample, role="teacher", why="sampled_logp is NaN")
            for each in groups
            for sample in self._fails(int(each.prompt.id))
        ]
        metrics = result.metrics | {"scoring_s": SCORING_S}
        return replace(result, metrics=metrics, unscored=tuple(unscored))


async def inside(tmp_path, *overrides, **more):
    config = load("configs/demo.toml", [*SMALL, *INSIDE, *overrides])
    (tmp_path / CONFIG).write_bytes(msgspec.json.encode(config))
    return await run(tmp_path, *INSIDE, *overrides, generators=[Pairs()], teachers={}, **more)


async def test_no_pool_scores_and_the_rows_say_what_the_learner_spent(tmp_path):
    learner = Scoring()
    summary, _, rows = await inside(tmp_path, learner=learner)
    assert len(learner.groups) == 5 * 2
    assert all(
        (each.scores, each.reference, each.by_learner, each.from_teacher)
        == (None, None, True, False)
        for each in learner.groups
    )
    assert all(row["scoring_s"] == SCORING_S for row in rows)
    assert all(row["teachers_tokens_per_s"] > 0 for row in rows)
    assert not [key for row in (*rows, summary) for key in row if key == "teachers_busy"]
    assert summary["rollouts_failed"] == 0


async def test_what_the_learner_cannot_score_stands_in_the_books(tmp_path):
    """One sample of every third prompt: each group is trained without it."""
    learner = Scoring(lambda prompt: (1,) if prompt % 3 == 0 else ())
    summary, _, rows = await inside(
        tmp_path,
        learner=learner,
    )
    ids = [int(id) for id in learner.trained]
    failed = sum(id % 3 == 0 for id in ids)
    assert failed and summary["rollouts_failed"] == rows[-1]["rollouts_failed"] == failed
    books = audit(tmp_path)
    assert books.failed_rollouts == {"teacher": failed} and not books.discrepancies
    assert books.trained == len(ids) == 10 and not books.outstanding


async def test_a_base_that_scores_nothing_of_most_groups_ends_the_run_by_its_name(tmp_path):
    learner = Scoring(lambda prompt: (0, 1) if prompt % 4 else ())
    with pytest.raises(TooManyDropped, match=r"failed \(3 teacher\).*sampled_logp is NaN"):
        await inside(tmp_path, learner=learner)
    assert not audit(tmp_path).discrepancies


async def test_the_scoring_is_a_span_of_the_learners_own_at_the_start_of_its_step(tmp_path):
    clock, lines = asyncio.get_running_loop().time, []
    meter = Meter([], clock=clock, spans=lines.extend)
    await inside(tmp_path, learner=Scoring(), meter=meter)
    meter.flush()
    calls = [call for line in lines for call in line.calls if call[0] == "learner"]
    steps = [call for call in calls if call[1] == "step"]
    scores = [call for call in calls if call[1] == "score"]
    assert len(steps) == len(scores) == 5
    for step, score in zip(steps, scores, strict=True):
        assert score[2] == step[2] and score[3] == pytest.approx(step[3], abs=1e-3)
        assert score[4] == pytest.approx(score[3] + SCORING_S)
        assert score[4] < step[4]
