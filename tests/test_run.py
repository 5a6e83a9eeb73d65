from types import SimpleNamespace

import pytest

from async_opd import run as runs
from async_opd.commands.demo import CONFIG as DEMO
from async_opd.config import load
from async_opd.crew import Roles
from async_opd.spans import FILE
from async_opd.toy.tokenizer import build_tokenizer
from async_opd.trace.read import recorded
from benchmarks.paced import Pace, PacedGenerator, PacedLearner, PacedTeacher, PacedVerifier, Prompts


def test_an_earlier_run_directory_is_kept_beside_the_new_one(tmp_path):
    for _ in range(3):
        runs.make_dir(tmp_path / "run").joinpath("mine").touch()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "run.1", "run.2"]
    assert all((p / "mine").exists() for p in tmp_path.iterdir())


class PacedCluster:
    """In place of Ray's: roles that take hardly any time."""

    def __init__(self, config, **_):
        self._config, self._pace = config, Pace.of(0.01, 0.01)

    def __enter__(self):
        return self

    def __exit__(self, *_): ...

    async def roles(self):
        learner = PacedLearner(self._pace, self._config.run.max_lag_steps)
        one, teacher, verifier = PacedGenerator(self._pace), PacedTeacher(self._pace), PacedVerifier(self._pace)
        return Roles(generators=[one], teachers={"": [teacher]}, verifier=verifier, learner=learner)


@pytest.mark.parametrize(("kept", "recorded_steps"), [(50, [None, *range(1, 13), None]), (0, None)])
async def test_a_run_leaves_the_spans_of_its_last_steps_if_any_are_to_be_kept(
    tmp_path, monkeypatch, kept, recorded_steps
):
    async def inputs(config):
        prompts = Prompts()
        prompts.skipped = 0
        return SimpleNamespace(prompts=prompts, held_out=[], eos_ids=[1], tokenizer=build_tokenizer())

    monkeypatch.setattr(runs, "Cluster", PacedCluster)
    monkeypatch.setattr(runs, "_inputs", inputs)
    monkeypatch.setattr(runs.gc, "freeze", lambda: None)  # the tests that follow have garbage of their own
    settings = (f"run.dir={tmp_path / 'run'}", f"run.trace_steps={kept}", "run.steps=12", "teacher.evaluate=false")
    summary = await runs.run(load(DEMO, [*settings, "learner.trajectories_per_step=4"]))
    assert summary["steps"] == summary["version"] == 12
    assert (tmp_path / "run" / FILE).exists() == (recorded_steps is not None)
    if recorded_steps:
        assert [line.step for line in recorded(tmp_path / "run").lines] == recorded_steps
