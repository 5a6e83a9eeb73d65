"""Held-out accuracy beside training, over simulated roles in virtual time."""

import asyncio
from itertools import islice

import pytest
from msgspec.structs import replace

from async_opd.core.errors import CallFailed
from async_opd.core.roles import Roles
from async_opd.core.wire import Prompt, Verdict
from async_opd.driver.replica_pool import ReplicaPool
from async_opd.driver.respond import respond
from async_opd.driver.train import train
from async_opd.telemetry.metrics import Meter
from async_opd.tools.audit.books import audit
from async_opd.tools.trace.read import calls
from tests.faults.test_paced import Generator, config_of
from tests.simulated.roles import (
    Pace,
    Prompts,
    RecordingLearner,
    SimulatedGenerator,
    SimulatedTeacher,
    SimulatedVerifier,
)
from tests.simulated.virtual_time import virtual

STEPS, BOUND = 30, 4
GENERATION_BOUND = Pace.of(1, 0.5)


class Verifier(SimulatedVerifier):
    """Every third held-out problem is wrong."""

    async def check(self, group):
        await super().check(group)
        return (
            Verdict(
                id=f"{group.id}#0",
                reward=float(not group.id.startswith("held") or int(group.id[5:]) % 3 > 0),
            ),
        )


def held_out(count: int) -> list[Prompt]:
    return [
        replace(prompt, id=f"held {index}") for index, prompt in enumerate(islice(Prompts(), count))
    ]


def run(tmp_path, *overrides: str, problems: int = 30, pace=GENERATION_BOUND, generators=None):
    """(summary, rows, events, learner) of a whole run."""
    settings = [
        f"run.steps={STEPS}",
        f"run.max_lag_steps={BOUND}",
        "rollout.concurrency=16",
        "run.dir=runs/simulated",
    ]
    config, rows, events, learner = (
        config_of(tmp_path, *settings, *overrides),
        [],
        [],
        RecordingLearner(pace, BOUND),
    )

    async def main():
        clock = asyncio.get_running_loop().time
        pool = generators or [Generator(pace, 0)]
        roles = Roles(
            generators=pool,
            teachers={"": [SimulatedTeacher(pace)]},
            verifier=Verifier(pace),
            learner=learner,
        )
        meter = Meter([rows.append], clock)
        arguments = held_out(problems), tmp_path, meter, lambda *event: events.append(event)
        return await train(config, roles, Prompts(), *arguments)

    summary = virtual(main())
    return summary, rows, [event for event in events if event[0] != "saved"], learner


def test_a_row_says_what_was_measured_and_of_which_versions(tmp_path):
    summary, rows, events, _ = run(tmp_path, "eval.every_steps=10", problems=24)
    evaluated = [row for row in rows if row["eval_accuracy"] is not None]
    # 30 is measured when training has ended
    assert [row["eval_version"] for row in evaluated] == [0, 10, 20]
    assert [row["eval_accuracy"] for row in evaluated] == [pytest.approx(2 / 3)] * 3
    for row in evaluated[1:]:
        assert (
            row["eval_version"] <= row["eval_version_min"] < row["eval_version_max"] <= row["step"]
        )
        assert (row["eval_tokens"], row["eval_truncated"], row["eval_unknown"]) == (128, 0, 0)
    assert (evaluated[0]["eval_version_min"], evaluated[0]["eval_version_max"]) == (0, 0)
    assert (summary["accuracy_after"], summary["eval_skipped"], events) == (
        pytest.approx(2 / 3),
        0,
        [],
    )
    assert len(rows) == STEPS and not any("eval_accuracy" not in row for row in rows)


def test_held_out_problems_charge_no_slot_and_are_in_no_book(tmp_path):
    summary, rows, _, learner = run(tmp_path, "eval.every_steps=5")
    assert len(learner.trained) == len(set(learner.trained)) == 16 * STEPS
    assert not any(id.startswith("held") for id in learner.trained)
    books = audit(tmp_path)
    assert (books.discrepancies, books.handed_out) == ([], 16 * STEPS)
    assert summary["max_lag_seen"] <= BOUND and max(
        row["queue_outstanding"] for row in rows
    ) <= 16 * (BOUND + 1)


def test_where_generation_is_the_bottleneck_training_loses_a_quarter_of_it_at_most(tmp_path):
    (tmp_path / "without").mkdir()
    (tmp_path / "with").mkdir()
    without, *_ = run(tmp_path / "without")
    # it never stops evaluating
    summary, rows, *_ = run(tmp_path / "with", "eval.every_steps=1", problems=60)
    assert 1 < summary["wall_s"] / without["wall_s"] <= 1 / 0.75 + 0.02
    # and comes to an end all the same
    assert sum(row["eval_accuracy"] is not None for row in rows) > 1


def test_where_it_is_not_training_loses_nothing(tmp_path):
    (tmp_path / "without").mkdir()
    (tmp_path / "with").mkdir()
    pace = Pace.of(0.5, 1)
    without, *_ = run(tmp_path / "without", pace=pace)
    summary, rows, *_ = run(tmp_path / "with", "eval.every_steps=10", problems=24, pace=pace)
    assert summary["wall_s"] == pytest.approx(without["wall_s"], rel=0.02)
    assert [row["eval_version"] for row in rows if row["eval_accuracy"] is not None] == [0, 10, 20]


def test_one_that_is_due_while_another_runs_is_skipped_and_counted(tmp_path):
    summary, rows, events, _ = run(tmp_path, "eval.every_steps=2", problems=60)
    skipped = [event for event in events if event[0] == "not evaluated"]
    assert skipped[0] == ("not evaluated", "version 4", "the one before still runs")
    measured = [row["eval_version"] for row in rows if row["eval_version"]]
    # the last may have been cut off at the end
    started = len(measured) + (summary["eval_skipped"] - len(skipped))
    assert started + len(skipped) == STEPS // 2 - 1
    assert rows[-1]["eval_skipped"] == len(skipped) > 3


def test_what_a_lost_generator_had_is_asked_of_another(tmp_path):
    class Dies(Generator):
        async def respond(self, prompt, sampling):
            if self.version:  # in the first that runs beside training
                asyncio.get_running_loop().call_later(0.1, self.died.set)
            return await super().respond(prompt, sampling)

    pool = [Dies(GENERATION_BOUND, 0), Generator(GENERATION_BOUND, 1)]
    summary, rows, events, learner = run(
        tmp_path, "eval.every_steps=10", problems=15, generators=pool
    )
    assert [event[:2] for event in events] == [("lost", "generator 0")]
    accuracies = [
        (row["eval_version"], row["eval_accuracy"])
        for row in rows
        if row["eval_accuracy"] is not None
    ]
    assert accuracies == [(version, pytest.approx(2 / 3)) for version in (0, 10, 20)]
    assert len(set(learner.trained)) == 16 * STEPS and summary["accuracy_after"] == pytest.approx(
        2 / 3
    )


def test_an_evaluation_that_fails_costs_training_nothing(tmp_path):
    refuses = Refuses(GENERATION_BOUND, 0)
    refuses.refused = {f"held {index}" for index in range(13)}
    summary, rows, events, learner = run(
        tmp_path, "eval.every_steps=10", problems=24, generators=[refuses]
    )
    skipped = [event[:2] for event in events if event[0] == "not evaluated"]
    assert skipped == [("not evaluated", f"version {version}") for version in (10, 20)]
    assert [row["eval_version"] for row in rows if row["eval_accuracy"] is not None] == [0]
    assert (summary["eval_skipped"], len(set(learner.trained))) == (2, 16 * STEPS)


class Refuses(Generator):
    """Has no response to some held-out problems while the run goes on."""

    refused: frozenset[str] | set[str] = frozenset({"held 7"})

    async def respond(self, prompt, sampling):
        if self.version and prompt.id in self.refused and self.version < STEPS:
            raise CallFailed("generator 0, respond: ValueError: no")
        return await super().respond(prompt, sampling)


def test_a_problem_that_nobody_responds_to_is_unknown_and_its_evaluation_goes_on(tmp_path):
    summary, rows, events, learner = run(
        tmp_path, "eval.every_steps=10", problems=24, generators=[Refuses(GENERATION_BOUND, 0)]
    )
    assert [event[:2] for event in events] == [
        ("refused", "generator 0"),
        ("failed", "evaluation of version 10"),
        ("failed", "evaluation of version 20"),
    ]
    assert "generator 0, respond: ValueError: no" in events[1][2]
    unknown = [row["eval_unknown"] for row in rows if row["eval_accuracy"] is not None]
    assert (unknown, summary["eval_unknown"]) == ([0, 1, 1], 0)
    assert (summary["eval_skipped"], len(set(learner.trained))) == (0, 16 * STEPS)


def test_without_a_period_rows_say_nothing_of_it(tmp_path):
    summary, rows, *_ = run(tmp_path)
    assert not any(key.startswith("eval_") for row in rows for key in row)
    assert summary["accuracy_before"] == pytest.approx(2 / 3) and "eval_skipped" not in summary


async def test_its_calls_are_told_from_those_for_a_prompt_of_the_same_id():
    lines = []
    meter = Meter([], spans=lines.extend)
    generators = ReplicaPool(
        "generator",
        [SimulatedGenerator()],
        actor_time=lambda index: meter.actor("generators", "generator 0"),
    )
    verifier = ReplicaPool(
        "verifier",
        [SimulatedVerifier()],
        actor_time=lambda index: meter.actor("verifier", "verifier 0"),
    )
    await respond(generators, verifier, next(iter(Prompts())))
    meter.flush()
    assert [(call.name, call.of) for call in calls(lines)] == [
        ("respond", "evaluation/0"),
        ("check", "evaluation/0"),
    ]


def test_with_weights_that_go_out_every_few_steps_an_evaluation_is_of_those_that_did(tmp_path):
    _, rows, _, _ = run(tmp_path, "eval.every_steps=10", "sync.every_steps=4", problems=8)
    evaluated = [row for row in rows if row["eval_accuracy"] is not None]
    assert [row["eval_version"] for row in evaluated] == [0, 12, 20]
    assert all(row["eval_version"] <= row["eval_version_min"] for row in evaluated)
