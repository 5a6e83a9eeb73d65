"""Phased teacher sampling in whole runs of the real driver over simulated roles, in virtual
time."""

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import msgspec
import pytest

from async_opd.cli.demo import CONFIG as DEMO
from async_opd.config.load import load
from async_opd.config.schema import Config
from async_opd.core.roles import Roles
from async_opd.core.wire import Prompt, StepResult, Verdict
from async_opd.driver.outcomes import Outcomes
from async_opd.driver.teacher_sampling import TeacherSampling
from async_opd.driver.train import train
from async_opd.roles.teacher.config import TeacherSamplingConfig
from async_opd.telemetry.metrics import ROLES, STATES, Meter
from tests.simulated.roles import (
    Pace,
    Prompts,
    SimulatedGenerator,
    SimulatedLearner,
    SimulatedTeacher,
    SimulatedVerifier,
)
from tests.simulated.runs import books, pools_over
from tests.simulated.virtual_time import virtual

PACE = Pace.of(1, 1, heavy_tail=True)
PER_STEP, STEPS = 8, 24
SHARE = 0.25  # prompts 3, 7, 11, … in order of admission
ANSWERED = "by the teacher"  # what marks its groups
SLOW = replace(PACE, token_s=PACE.token_s * 3)


class Asked(SimulatedGenerator):
    """The teacher's own generator; keeps (live version, prompt) of each request. It has sampled
    before training starts, and is never updated."""

    def __init__(self, pace: Pace, learner: SimulatedLearner):
        super().__init__(pace, seed=1)
        self._learner, self.asked, self.warm = learner, [], False

    async def generate(self, prompt):
        assert self.warm
        self.asked.append((self._learner.version, int(prompt.id)))
        meta, group = await super().generate(prompt)
        return meta, msgspec.structs.replace(group, answer=ANSWERED)

    async def probe(self):
        self.warm = not self.asked
        return await super().probe()

    async def update(self, version, layout, oldest):
        raise AssertionError("the teacher takes no weights")


class Judge(SimulatedVerifier):
    """A verdict on a response is what `judge` says of its prompt."""

    def __init__(self, pace: Pace, judge: Callable[[Prompt], float | None]):
        super().__init__(pace)
        self._judge = judge

    async def check(self, group):
        (verdict,) = await super().check(group)
        return (Verdict(id=verdict.id, reward=self._judge(group)),)


def drawn(outcomes: list[float | None]) -> Callable[[Prompt], float | None]:
    """The student is right, the teacher at random."""
    draw = random.Random(0)
    return lambda prompt: draw.choice(outcomes) if prompt.answer == ANSWERED else 1.0


class Unscoring(SimulatedTeacher):
    async def score(self, group):
        assert group.answer != ANSWERED
        return await super().score(group)


class Learns(SimulatedLearner):
    """Keeps (step, prompt) of what it trained; lags are those of the student's tokens."""

    def __init__(self, pace: Pace, bound: int):
        super().__init__(pace, bound)
        self.trained, self.answers = [], []

    async def step(self, groups) -> StepResult:
        for group in groups:
            (self.answers if group.from_teacher else self.trained).append(
                (self.version + 1, int(group.prompt.id))
            )
            assert (group.scores is None and group.since <= self.version) or not group.from_teacher
        if own := [group for group in groups if not group.from_teacher]:
            return await super().step(own)
        await asyncio.sleep(self.pace.step_s)
        self.version += 1
        return StepResult(
            version=self.version, metrics={"tokens": 0, "tokens_excluded": 0, "lag_max": 0}
        )


@dataclass
class Found:
    """What a run did."""

    config: Config
    summary: dict
    learner: Learns
    asked: list[tuple[int, int]]
    rows: list[dict] = field(default_factory=list)


def run(
    tmp_path,
    *overrides: str,
    bound: int = 4,
    judge=lambda prompt: 1.0,
    pace: Pace = SLOW,
    asked: type[Asked] = Asked,
) -> Found:
    """A run over a pool of 2 of the teacher's generators, which take 3 times as long as the
    student's."""
    sampling = {"share": SHARE, "full_until_step": 6, "until_step": 12}
    settings = [
        f"run.steps={STEPS}",
        f"learner.trajectories_per_step={PER_STEP}",
        f"run.max_lag_steps={bound}",
    ]
    settings += [f"teacher_sampling.{key}={value}" for key, value in sampling.items()] + [
        "teacher.evaluate=false"
    ]
    config = load("configs/demo.toml", [*settings, *overrides])
    learner, rows = Learns(PACE, bound), []
    pool = [asked(pace, learner), asked(pace, learner)]
    roles = Roles(
        generators=[SimulatedGenerator(PACE), SimulatedGenerator(PACE, seed=2)],
        teachers={"": [Unscoring(PACE)]},
        verifier=Judge(PACE, judge),
        learner=learner,
        teacher_generators=pool,
    )

    async def main():
        meter = Meter([rows.append], asyncio.get_running_loop().time)
        async with asyncio.timeout(3600):  # virtual; a run that lost a slot never ends
            return await train(config, roles, Prompts(), [], tmp_path, meter)

    summary = virtual(main())
    assert all(engine.asked for engine in pool)
    return Found(
        config,
        summary,
        learner,
        sorted(request for engine in pool for request in engine.asked),
        rows,
    )


CAUSES = ("wrong", "unknown", "truncated", "late")
SCHEDULES = {
    "ends inside the run": (),
    "has a weight to its last step": ("teacher_sampling.weight_end=0.5",),
    "falls at once": ("teacher_sampling.full_until_step=12",),
    "outlasts the run": ("teacher_sampling.until_step=99",),
}


@pytest.mark.parametrize("stale", ["mask", "drop"])
@pytest.mark.parametrize("bound", [0, 1, 4])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_the_bound_the_slots_and_the_counts_hold_whatever_the_schedule(
    tmp_path, schedule, bound, stale
):
    judge = drawn([1.0, 1.0, 1.0, 0.5, None])
    found = run(tmp_path, *schedule, f"run.stale={stale}", bound=bound, judge=judge)
    summary, last = found.summary, found.rows[-1]
    trained = [prompt for _, prompt in found.learner.trained + found.learner.answers]
    # none twice, and the run came to its end
    assert len(trained) == len(set(trained)) == STEPS * PER_STEP
    assert last["queue_outstanding"] == last["queue_ready"] == 0  # every slot came back
    assert summary["max_lag_seen"] <= bound

    requests = [prompt for _, prompt in found.asked]
    # every fourth prompt, as long as there are any
    assert requests == list(range(3, requests[-1] + 1, 4))
    assert len(requests) == summary["taught_requested"]
    assert (
        len(found.learner.answers)
        == summary["taught_trained"]
        == sum(row["taught"] for row in found.rows)
    )
    ends = [summary["taught_trained"], *(summary[f"dropped_teacher_{cause}"] for cause in CAUSES)]
    assert sum(ends) == len(requests)
    assert min(ends[:3]) > 0  # trained, wrong, unknown

    weight = found.config.teacher_sampling.weight
    assert all(weight(step) > 0 for step, _ in found.learner.answers)
    assert all(weight(version + 1) > 0 for version, _ in found.asked)


def test_after_the_last_step_with_a_weight_none_is_asked_for_and_what_is_in_flight_is_discarded(
    tmp_path,
):
    found = run(tmp_path, "teacher_sampling.weight_end=0.5")
    assert max(version + 1 for version, _ in found.asked) <= 12  # P2
    assert max(step for step, _ in found.learner.answers) == 12
    assert found.summary["dropped_teacher_late"] > 0
    assert found.summary["taught_trained"] + found.summary["dropped_teacher_late"] == len(
        found.asked
    )
    assert found.summary["scored_dropped"] == 0  # no score was thrown away


@pytest.mark.parametrize(("bound", "every"), [(1, 2), (4, 3), (4, 5)])
def test_slots_of_what_is_trained_and_not_published_yet_keep_no_step_waiting(
    tmp_path, bound, every
):
    found = run(
        tmp_path,
        f"sync.every_steps={every}",
        "teacher_sampling.until_step=99",
        "teacher_sampling.share=0.5",
        bound=bound,
    )
    assert len(found.learner.trained + found.learner.answers) == STEPS * PER_STEP
    assert found.summary["max_lag_seen"] <= bound


def test_a_step_of_no_weight_trains_none_of_them(tmp_path):
    found = run(tmp_path)  # the weight ends at 0 in step 12
    assert max(step for step, _ in found.learner.answers) < 12
    assert found.summary["dropped_teacher_late"] > 0
    assert [row["taught_weight"] for row in found.rows][5:12] == pytest.approx(  # steps 6 to 12
        [1, 0.933013, 0.75, 0.5, 0.25, 0.066987, 0], abs=1e-6
    )


def test_a_teacher_that_is_never_right_costs_the_run_no_step(tmp_path):
    found = run(
        tmp_path,
        "teacher_sampling.until_step=99",
        judge=lambda prompt: float(prompt.answer != ANSWERED),
    )
    # and no prompt
    assert sorted(prompt for _, prompt in found.learner.trained) == list(range(STEPS * PER_STEP))
    assert found.summary["dropped_teacher_wrong"] == len(found.asked) == STEPS * PER_STEP // 4


def test_an_answer_whose_log_probs_are_none_is_never_trained_however_right(tmp_path):
    class Odd(Asked):
        async def generate(self, prompt):
            meta, group = await super().generate(prompt)
            why = "nan" if int(prompt.id) % 8 == 3 else ""
            return msgspec.structs.replace(meta, failures=(why,)), group

    found = run(tmp_path, "teacher_sampling.until_step=99", asked=Odd)
    answers = {prompt for _, prompt in found.learner.answers}
    failed = {prompt for _, prompt in found.asked if prompt % 8 == 3}
    assert failed and answers and not answers & failed
    assert failed <= {prompt for _, prompt in found.learner.trained}  # the student's, then
    assert found.summary["dropped_failed"] == len(failed)


def test_what_no_version_sampled_never_ages(tmp_path):
    forever = replace(PACE, token_s=PACE.token_s * 10)  # several steps an answer, at a bound of 0
    found = run(tmp_path, "teacher_sampling.until_step=99", bound=1, pace=forever)
    waited = dict((prompt, version) for version, prompt in found.asked)
    lags = [step - 1 - waited[prompt] for step, prompt in found.learner.answers]
    assert max(lags) > 1
    assert len(found.learner.answers) == len(found.asked)  # all of them were trained


def test_the_accuracy_of_a_step_is_the_students_own(tmp_path):
    found = run(tmp_path, judge=lambda prompt: float(prompt.answer == ANSWERED))
    assert {row["accuracy"] for row in found.rows} == {0.0}


def test_its_generators_are_a_role_with_times_of_its_own(tmp_path):
    found = run(tmp_path)
    for row in (*found.rows, found.summary):
        for role in (*ROLES, "teacher_generators"):
            assert sum(row[f"{role}_{state}"] for state in STATES) == pytest.approx(1, abs=0.01)
    assert found.summary["teacher_generators_busy"] > 0
    assert found.rows[-1]["teacher_generators_starved"] == pytest.approx(1)  # nobody asks any more


@pytest.mark.parametrize(
    ("share", "expected"),
    [(0.125, [7, 15, 23, 31, 39]), (0.3, [3, 6, 9, 13, 16]), (0.9, [1, 2, 3])],
)
def test_the_prompts_are_spread_evenly(share, expected):
    async def asked() -> list[int]:
        async with asyncio.TaskGroup() as tasks:
            pools = pools_over(
                generators=[],
                teachers={},
                verifier=SimulatedVerifier(),
                teacher_generators=[SimulatedGenerator()],
            )
            sampling = TeacherSampling(
                TeacherSamplingConfig(share=share, full_until_step=1, until_step=1),
                pools,
                Queue(),
                tasks,
                version=lambda: 0,
                keeps_truncated=True,
                outcomes=Outcomes(load(DEMO, []), 1, books(), lambda what, who, why: None),
                ledger=books(),
            )
            prompts = zip(range(expected[-1] + 1), Prompts(), strict=False)
            return [ticket for ticket, prompt in prompts if sampling.answers(ticket, prompt)]

    assert virtual(asked()) == expected


class Queue:
    """Takes what comes."""

    def put(self, group): ...
