"""Each state of each role, provoked one at a time: virtual seconds of single actors, then whole
runs."""

import asyncio
from dataclasses import replace

import pytest

from async_opd.core.errors import ActorLost
from async_opd.core.ports import Generator, Teacher, Verifier
from async_opd.driver.replica import Replica
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


class Slow(SimulatedGenerator, SimulatedTeacher, SimulatedVerifier):
    """Generator, teacher or verifier whose every answer takes a second."""

    async def generate(self, prompt):
        await asyncio.sleep(1)
        return await super().generate(prompt)

    async def score(self, group):
        await asyncio.sleep(1)
        return ("",), None

    async def check(self, group):
        await asyncio.sleep(1)
        return ()

    async def update(self, version, layout, oldest):
        await asyncio.sleep(1)

    async def load(self, folder):
        await asyncio.sleep(2)


def spent(scenario, role: str, idle: str = "starved") -> dict[str, float]:
    """Virtual seconds by state of one actor that goes through `scenario`; only those that are not
    0."""

    async def account():
        clock = asyncio.get_running_loop().time
        actor = Meter([], clock).actor(role)
        await scenario(Replica(role, 0, Slow(), actor, idle=idle))
        return {
            state: round(seconds, 6)
            for state in STATES
            if (seconds := actor.seconds(state, clock()))
        }

    return virtual(account())


def asks(replica, method, *args) -> asyncio.Task:
    return asyncio.ensure_future(replica.call(method, *args))


def prompt():
    return next(iter(Prompts()))


def test_a_generator_is_busy_while_any_request_is_out_and_else_blocked_until_no_prompt_is_left():
    async def scenario(generator):
        first = asks(generator, Generator.generate, prompt())
        await asyncio.sleep(0.5)
        # overlaps the first: busy for 1.5 s
        await generator.call(Generator.generate, prompt())
        await first
        await asyncio.sleep(2)  # prompts are left, but no slot: blocked
        generator.idles("starved")
        await asyncio.sleep(4)

    assert spent(scenario, "generators", "blocked") == {"busy": 1.5, "blocked": 2, "starved": 4}


def test_a_generator_is_syncing_from_update_to_resume_whatever_is_out():
    async def scenario(generator):
        asking = asks(generator, Generator.generate, prompt())
        await asyncio.sleep(0.25)
        with generator.held("syncing"):
            await generator.call(Generator.update, 1, None, 0)  # 1 s, in which the request ends
            await asyncio.sleep(2)  # until it is told to run on
            await generator.call(Generator.resume, 0)
        await asking
        await generator.call(Generator.generate, prompt())

    assert spent(scenario, "generators", "blocked") == {"busy": 1.25, "syncing": 3}


def test_a_member_is_down_from_its_end_until_another_takes_its_place_whatever_still_comes_back():
    async def scenario(lost):
        asking = asks(lost, Generator.generate, prompt())
        await asyncio.sleep(0.25)
        lost.leave("it is gone")
        with pytest.raises(ActorLost, match="it is gone"):
            await asking
        with pytest.raises(ActorLost, match="it is gone"):
            await lost.call(Generator.generate, prompt())
        await asyncio.sleep(2.75)
        another = Replica("generator 0", 0, Slow(), lost._time, idle="blocked")
        await another.call(Generator.generate, prompt())
        await asyncio.sleep(1)

    found = spent(scenario, "generators", "blocked")
    assert found == {"busy": 1.25, "down": 2.75, "blocked": 1}


@pytest.mark.parametrize("method", [Teacher.score, Verifier.check])
def test_a_teacher_or_verifier_without_a_group_is_starved(method):
    async def scenario(replica):
        await asyncio.sleep(2)
        await replica.call(method, None)

    assert spent(scenario, "teachers") == {"busy": 1, "starved": 2}


def test_a_teacher_is_syncing_while_it_takes_the_student_s_weights_whatever_is_out():
    async def scenario(teacher):
        asking = asks(teacher, Teacher.score, None)
        await asyncio.sleep(0.25)
        with teacher.held("syncing"):
            await teacher.call(Teacher.load, "folder")  # 2 s, in which the score comes
        await asking
        await asyncio.sleep(1)

    assert spent(scenario, "teachers") == {"busy": 0.25, "syncing": 2, "starved": 1}


def test_a_call_is_a_span_of_what_it_was_of_and_one_that_is_cut_off_says_so():
    lines = []

    async def account():
        clock = asyncio.get_running_loop().time
        meter = Meter([], clock, spans=lines.extend)
        replica = Replica("generator 0", 0, Slow(), meter.actor("generators", "generator 0"))
        await replica.call(Generator.generate, prompt(), of="0")
        cut = asks(replica, Generator.generate, prompt())
        await asyncio.sleep(0.5)
        replica.leave("it is gone")
        await asyncio.wait([cut])
        meter.flush()

    virtual(account())
    calls = [call for line in lines for call in line.calls]
    assert [(name, call, of) for name, call, of, _, _ in calls] == [
        ("generator 0", "generate", "0"),
        ("generator 0", "generate, cut off", ""),
    ]
    assert [end - start for *_, start, end in calls] == [1, 0.5]


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
