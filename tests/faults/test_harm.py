"""Roles that refuse everything, and prompts that end whom they are asked of: the real driver over
simulated roles, in virtual time."""

import asyncio
import json
from itertools import islice

import pytest
from msgspec.structs import replace

from async_opd.core.errors import ActorLost, CallFailed, TooManyDropped, WireError
from async_opd.core.roles import Roles
from async_opd.driver import checkpoints
from async_opd.driver.train import train
from async_opd.telemetry.metrics import Meter
from async_opd.tools.audit.books import audit
from tests.faults.test_paced import config_of
from tests.simulated.roles import (
    Pace,
    Prompts,
    RecordingLearner,
    SimulatedGenerator,
    SimulatedTeacher,
    SimulatedVerifier,
)
from tests.simulated.virtual_time import virtual

PACE = Pace.of(1, 1)
STEPS = 12
SLOTS = 16 * 5


class Harmed:
    """A role that refuses its calls by `error` where there is one, and dies of those that are
    `deadly`, with all that it has in flight."""

    def __init__(self, deadly=(), error=None):
        super().__init__(PACE)
        self.deadly, self.error, self.asked = deadly, error, []
        self.died = asyncio.Event()

    async def _does(self, id, call):
        self.asked.append(id)
        if self.error:
            call.close()
            raise self.error
        if id in self.deadly:
            asyncio.get_running_loop().call_later(0.2, self.died.set)
            call.close()
            call = asyncio.sleep(1000)
        answer, death = asyncio.ensure_future(call), asyncio.ensure_future(self.died.wait())
        try:
            await asyncio.wait((answer, death), return_when=asyncio.FIRST_COMPLETED)
            if self.died.is_set():
                raise ActorLost("its engine died")
            return answer.result()
        finally:
            answer.cancel()
            death.cancel()

    async def check_health(self):
        if self.died.is_set():
            raise ActorLost("its engine died")

    def kill(self): ...


class Generator(Harmed, SimulatedGenerator):
    async def generate(self, prompt):
        return await self._does(prompt.id, super().generate(prompt))

    async def respond(self, prompt, sampling):
        return await self._does(prompt.id, super().respond(prompt, sampling))


class Teacher(Harmed, SimulatedTeacher):
    async def score(self, group):
        return await self._does(group.id, super().score(group))


class Verifier(Harmed, SimulatedVerifier):
    async def check(self, group):
        return await self._does(group.id, super().check(group))


KINDS = {
    "generators": Generator,
    "teachers": Teacher,
    "reference": Teacher,
    "verifier": Verifier,
    "teacher_generators": Generator,
}
NAMES = {
    "generators": "generator",
    "teachers": "teacher",
    "reference": "reference",
    "verifier": "verifier",
    "teacher_generators": "teacher-generator",
}
POOLS = [role for role in KINDS if role != "verifier"]


class Run:
    """A run of `roles`, one of each that is not given; replacements die of the same."""

    def __init__(self, folder, *settings, held_out=0, **roles):
        if "teacher_generators" in roles:  # they answer half of the prompts
            until = ("full_until_step=20", "until_step=20", "share=0.5")
            settings += tuple(f"teacher_sampling.{each}" for each in until)
        self.folder, self.roles = folder, roles
        self.config = config_of(folder, f"run.steps={STEPS}", *settings)
        prompts = islice(Prompts(), held_out)
        self.held_out = [replace(prompt, id=f"held {prompt.id}") for prompt in prompts]
        self.events, self.rows, self.learner = [], [], RecordingLearner(PACE)

    def train(self):
        def emit(*event):
            self.events.append(event)

        async def spawn(name, index):
            await asyncio.sleep(5)
            role = next(role for role, called in NAMES.items() if called == name)
            return KINDS[role](self.roles[role][-1].deadly)

        async def main():
            (verifier,) = self.roles.get("verifier") or [Verifier()]
            roles = Roles(
                generators=self.roles.get("generators") or [Generator()],
                teachers={"": self.roles.get("teachers") or [Teacher()]},
                references=self.roles.get("reference", []),
                teacher_generators=self.roles.get("teacher_generators", []),
                verifier=verifier,
                learner=self.learner,
                spawn=spawn,
            )
            meter = Meter([self.rows.append, self._write], asyncio.get_running_loop().time)
            job = train(self.config, roles, Prompts(), self.held_out, self.folder, meter, emit)
            async with asyncio.timeout(10**5):
                return await job

        return virtual(main())

    def _write(self, row):
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    def said(self, *names):
        return [event[:2] for event in self.events if event[0] in names]


@pytest.mark.parametrize("error", [CallFailed("ValueError: no"), WireError("3#0: nan")])
@pytest.mark.parametrize("role", KINDS)
def test_a_role_that_refuses_everything_ends_the_run_by_name_and_is_not_fed_the_data(
    tmp_path, role, error
):
    refuses = KINDS[role](error=error)
    run = Run(tmp_path, **{role: [refuses]})
    with pytest.raises(TooManyDropped, match=f"groups.*failed.*{error}"):
        run.train()
    books = audit(tmp_path)
    assert books.discrepancies == []
    assert sum(books.dropped.values()) <= SLOTS
    assert len(set(refuses.asked)) <= 2 * SLOTS
    assert len(refuses.asked) / len(set(refuses.asked)) <= 6
    name = NAMES[role]
    assert (("refused", f"{name} 0")) in run.said("refused")
    assert (("failed", name)) in run.said("failed")
    trained = [run.learner.version] if run.learner.version else []
    assert [*checkpoints.committed(tmp_path / "checkpoints")] == trained


@pytest.mark.parametrize("role", POOLS)
def test_of_two_the_one_that_refuses_costs_no_group_and_is_replaced(tmp_path, role):
    refuses, answers = KINDS[role](error=CallFailed("no")), KINDS[role]()
    run = Run(tmp_path, "run.steps=20", **{role: [refuses, answers]})
    summary = run.train()
    assert summary["scored_dropped"] == 0
    assert len(set(run.learner.trained)) == len(run.learner.trained) == 20 * 16
    name = NAMES[role]
    assert run.said("refused", "lost") == [("refused", f"{name} 0"), ("lost", f"{name} 0")]
    # a burst at the beginning, then one at a time
    assert len(refuses.asked) <= SLOTS + 10
    assert audit(tmp_path).discrepancies == []


@pytest.mark.parametrize("failures", [("0#0: behaviour_logp[0] = nan",), ("a", "b")])
def test_what_a_generator_spoils_another_is_asked_for(tmp_path, failures):
    class Spoils(Generator):
        async def generate(self, prompt):
            meta, group = await super().generate(prompt)
            if int(prompt.id) % 5 == 0:  # one of its rollouts, or a message that is no group's
                return replace(meta, failures=failures), group
            return meta, group

    run = Run(tmp_path, generators=[Spoils(), Generator()])
    summary = run.train()
    assert (summary["scored_dropped"], summary["rollouts_failed"]) == (0, 0)
    assert len(set(run.learner.trained)) == STEPS * 16
    assert run.said("lost") == []
    assert audit(tmp_path).discrepancies == []


@pytest.mark.parametrize(
    ("role", "members"), [*((role, 1) for role in KINDS), *((role, 2) for role in POOLS)]
)
def test_a_prompt_that_ends_members_costs_three_and_nobody_beside_it(tmp_path, role, members):
    run = Run(tmp_path, **{role: [KINDS[role](deadly=("37",)) for _ in range(members)]})
    summary = run.train()
    lost = [who for _, who in run.said("lost")]
    assert len(lost) == 3, run.events
    books = audit(tmp_path)
    assert (books.discrepancies, books.outstanding) == ([], [])
    name = NAMES[role]
    if role == "teacher_generators":  # the student responds in its place
        assert (books.dropped, books.reissued) == ({}, {"failed": 1})
        assert "37" in run.learner.trained
    else:
        assert (books.dropped, books.reissued) == ({"failed": 1}, {})
        assert "37" not in run.learner.trained
    assert summary["dropped_failed"] == 1
    assert len(set(run.learner.trained)) == STEPS * 16
    ((_, who, why),) = [event for event in run.events if event[0] == "failed"]
    assert who == name and "37: it ends whom it is asked of" in why


def test_two_such_prompts_are_both_found(tmp_path):
    run = Run(tmp_path, generators=[Generator(deadly=("37", "38")) for _ in range(2)])
    run.train()
    assert len(run.said("lost")) <= 6
    books = audit(tmp_path)
    assert (books.discrepancies, books.dropped, books.reissued) == ([], {"failed": 2}, {})
    assert not {"37", "38"} & set(run.learner.trained)
    assert len(set(run.learner.trained)) == STEPS * 16


@pytest.mark.parametrize("role", ["generators", "verifier"])
def test_such_a_problem_of_an_evaluation_is_unknown_and_costs_three_in_all(tmp_path, role):
    run = Run(
        tmp_path,
        "eval.every_steps=5",
        held_out=8,
        **{role: [KINDS[role](deadly=("held 3",)) for _ in range(1 if role == "verifier" else 2)]},
    )
    summary = run.train()
    assert len(run.said("lost")) == 3
    measured = [row for row in run.rows if row["eval_accuracy"] is not None]
    assert measured and {row["eval_unknown"] for row in measured} == {1}
    assert (summary["eval_unknown"], summary["scored_dropped"]) == (2, 0)
    assert len(set(run.learner.trained)) == STEPS * 16
    assert audit(tmp_path).discrepancies == []
