"""Each state of each role, provoked one at a time: virtual seconds of single actors, then whole
runs."""

import asyncio
from dataclasses import replace
from functools import partial

import pytest

from async_opd.driver.timed import TimedGenerator, TimedTeacher, TimedVerifier
from async_opd.telemetry.metrics import ROLES, STATES, Meter
from tests.simulated.roles import (
    Pace,
    Prompts,
    SimulatedGenerator,
    SimulatedTeacher,
    SimulatedVerifier,
)
from tests.simulated.runs import measure
from tests.simulated.virtual_time import virtual

WITH_SLOTS = partial(TimedGenerator, idle="blocked")


class Slow(SimulatedGenerator, SimulatedTeacher, SimulatedVerifier):
    """Generator, teacher or verifier whose every answer takes a second."""

    async def generate(self, prompt):
        await asyncio.sleep(1)
        return await super().generate(prompt)

    async def score(self, group):
        await asyncio.sleep(1)

    async def check(self, group):
        await asyncio.sleep(1)
        return ()

    async def update(self, version, update_info, oldest):
        await asyncio.sleep(1)

    async def load(self, folder):
        await asyncio.sleep(2)


def spent(scenario, wrap, role: str) -> dict[str, float]:
    """Virtual seconds by state of one actor that goes through `scenario`; only those that are not
    0."""

    async def account():
        clock = asyncio.get_running_loop().time
        actor = Meter([], clock).actor(role)
        await scenario(wrap(Slow(), actor))
        return {
            state: round(seconds, 6)
            for state in STATES
            if (seconds := actor.seconds(state, clock()))
        }

    return virtual(account())


def test_a_generator_is_busy_while_any_request_is_out_and_else_blocked_until_no_prompt_is_left():
    async def scenario(generator):
        first = asyncio.ensure_future(generator.generate(next(iter(Prompts()))))
        await asyncio.sleep(0.5)
        await generator.generate(next(iter(Prompts())))  # overlaps the first: busy for 1.5 s
        await first
        await asyncio.sleep(2)  # prompts are left, but no slot: blocked
        generator.no_prompt_is_left()
        await asyncio.sleep(4)

    assert spent(scenario, WITH_SLOTS, "generators") == {"busy": 1.5, "blocked": 2, "starved": 4}


def test_a_generator_is_syncing_from_update_to_resume_whatever_is_out():
    async def scenario(generator):
        asking = asyncio.ensure_future(generator.generate(next(iter(Prompts()))))
        await asyncio.sleep(0.25)
        await generator.update(1, {}, 0)  # 1 s, in which the request ends
        await asyncio.sleep(2)  # until it is told to run on
        await generator.resume()
        await asking
        await generator.generate(next(iter(Prompts())))

    assert spent(scenario, WITH_SLOTS, "generators") == {"busy": 1.25, "syncing": 3}


def test_a_member_is_down_from_its_end_until_another_takes_its_place_whatever_still_comes_back():
    times = []

    def wrap(port, time):
        times.append(time)
        return WITH_SLOTS(port, time)

    async def scenario(timed):
        asking = asyncio.ensure_future(timed.generate(next(iter(Prompts()))))
        await asyncio.sleep(0.25)
        timed.kill()
        await asking  # its late answer, at 1 s
        await asyncio.sleep(2)
        another = WITH_SLOTS(Slow(), *times)
        await another.generate(next(iter(Prompts())))
        await asyncio.sleep(1)

    assert spent(scenario, wrap, "generators") == {"busy": 1.25, "down": 2.75, "blocked": 1}


@pytest.mark.parametrize(("wrap", "call"), [(TimedTeacher, "score"), (TimedVerifier, "check")])
def test_a_teacher_or_verifier_without_a_group_is_starved(wrap, call):
    async def scenario(timed):
        await asyncio.sleep(2)
        await getattr(timed, call)(None)

    assert spent(scenario, wrap, "teachers") == {"busy": 1, "starved": 2}


def test_a_teacher_is_syncing_while_it_takes_the_student_s_weights_whatever_is_out():
    async def scenario(teacher):
        asking = asyncio.ensure_future(teacher.score(None))
        await asyncio.sleep(0.25)
        await teacher.load("folder")  # 2 s, in which the score comes
        await asking
        await asyncio.sleep(1)

    assert spent(scenario, TimedTeacher, "teachers") == {"busy": 0.25, "syncing": 2, "starved": 1}


BALANCED = Pace.of(1, 1)


def run(pace: Pace, *, bound: int = 4, steps: int = 20) -> dict:
    """Summary of a whole run over simulated roles, in virtual time."""
    return virtual(measure(pace, bound=bound, steps=steps))


@pytest.mark.parametrize("bound", [0, 1, 4])
def test_the_shares_of_every_role_add_up_to_the_whole_run(bound):
    summary = run(replace(BALANCED, heavy_tail=True, sync_s=0.05), bound=bound)
    for role in ROLES:
        assert sum(summary[f"{role}_{state}"] for state in STATES) == pytest.approx(1, abs=0.01)


def test_a_slow_teacher_blocks_the_generators_and_starves_the_learner():
    # scoring takes 4 times as long as the rest
    summary = run(replace(BALANCED, score_s=4 * BALANCED.step_s / 16))
    assert summary["teachers_busy"] > 0.95
    # 3/4 of the time but for the start
    assert summary["generators_blocked"] == pytest.approx(0.6, abs=0.1)
    assert summary["learner_starved"] == pytest.approx(0.75, abs=0.05)


def test_a_slow_generator_starves_teacher_and_learner():
    summary = run(Pace.of(4, 1))
    assert summary["generators_busy"] > 0.9
    assert summary["generators_blocked"] == 0
    assert summary["learner_starved"] == pytest.approx(0.75, abs=0.05)
    assert summary["teachers_starved"] > 0.9


def test_a_slow_learner_is_busy_and_blocks_the_generators():
    summary = run(Pace.of(0.25, 1))
    assert summary["learner_busy"] > 0.9
    assert summary["generators_blocked"] > 0.5


def test_a_slow_update_is_syncing_for_generators_and_learner():
    summary = run(replace(BALANCED, sync_s=BALANCED.step_s))
    assert summary["generators_syncing"] == pytest.approx(0.5, abs=0.05)
    assert summary["learner_syncing"] == pytest.approx(0.5, abs=0.05)


def test_in_a_synchronous_run_generators_are_blocked_while_the_learner_is_busy():
    summary = run(replace(BALANCED, score_s=1e-6, check_s=0, sync_s=1e-6), bound=0)
    assert summary["learner_busy"] == pytest.approx(summary["generators_blocked"], abs=0.03)
    assert summary["learner_starved"] == pytest.approx(summary["generators_busy"], abs=0.03)
