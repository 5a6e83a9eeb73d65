import asyncio

import msgspec
import pytest

from async_opd.core.errors import ActorLost, TooManyDropped, WireError
from async_opd.core.wire import Span, Verdict
from async_opd.roles.teacher.config import TeacherSamplingConfig
from tests.simulated.roles import Prompts, SimulatedGenerator, SimulatedTeacher, SimulatedVerifier
from tests.simulated.runs import admission_over, pools_over
from tests.simulated.virtual_time import virtual


class Generator(SimulatedGenerator):
    """Keeps the prompts it was given."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.served = []

    async def generate(self, prompt):
        self.served.append(prompt)
        return await super().generate(prompt)


ONE_BY_ONE = dict(groups_per_step=1, max_lag_steps=0, stale="drop")


def over(
    tasks,
    generators,
    *,
    slots=2,
    needed=10,
    teachers=None,
    references=(),
    verifier=None,
    own=(),
    **settings,
):
    """(admission, queue, slots) over simulated roles; `own` are the teacher's generators."""
    pools = pools_over(
        generators=generators,
        teachers=teachers or {"": [SimulatedTeacher()]},
        references=references,
        verifier=verifier or SimulatedVerifier(),
        teacher_generators=own,
    )
    return admission_over(tasks, pools, slots=slots, needed=needed, queue=ONE_BY_ONE, **settings)


async def settle() -> None:
    for _ in range(50):
        await asyncio.sleep(0)


async def test_no_more_groups_are_outstanding_than_slots():
    generator = Generator()
    async with asyncio.TaskGroup() as tasks:
        admission, queue, slots = over(tasks, [generator])
        admission.fill()
        await settle()
        assert [p.id for p in generator.served] == ["0", "1"]
        slots.give_back((await queue.take(0))[0].ticket)
        admission.fill()
        await settle()
    assert [p.id for p in generator.served] == ["0", "1", "2"]


async def test_exactly_the_needed_groups_are_admitted():
    generator = Generator()
    async with asyncio.TaskGroup() as tasks:
        over(tasks, [generator], slots=8, needed=3)[0].fill()
    assert len(generator.served) == 3


async def test_work_is_spread_over_generators():
    generators = [Generator(), Generator()]
    async with asyncio.TaskGroup() as tasks:
        over(tasks, generators, slots=6, needed=6)[0].fill()
    assert [len(g.served) for g in generators] == [3, 3]


async def test_an_over_age_group_is_issued_again_at_the_front_and_keeps_its_slot():
    generator = Generator()
    async with asyncio.TaskGroup() as tasks:
        admission, queue, slots = over(tasks, [generator], slots=1)
        admission.fill()
        await settle()
        generator.version = 1
        (ready,) = await queue.take(1)  # version 0 is over age now
        assert (ready.prompt.id, ready.prompt.attempt, ready.meta.oldest) == ("0", 1, 1)
        assert slots.free == 0
    assert queue.dropped == {"stale": 1}


async def test_a_group_cut_by_the_length_limit_is_dropped_for_good_after_its_last_attempt():
    class Cut(Generator):
        async def generate(self, prompt):
            self.truncated = prompt.id == "0"
            return await super().generate(prompt)

    generator = Cut()
    async with asyncio.TaskGroup() as tasks:
        admission, queue, slots = over(
            tasks, [generator], slots=1, needed=1, truncated="drop", attempts=2
        )
        admission.fill()
        await settle()
        # replaced by "1"
        assert [(p.id, p.attempt) for p in generator.served[:3]] == [("0", 0), ("0", 1), ("1", 0)]
        assert len(await queue.take(0)) == 1
    assert queue.dropped == {"truncated": 2}
    assert slots.free == 0


async def test_the_last_generator_that_dies_ends_the_stream_with_its_own_error():
    class Dead(SimulatedGenerator):
        async def generate(self, prompt):
            raise ActorLost("generator 0 died")

    with pytest.RaisesGroup(pytest.RaisesExc(ActorLost, match="generator 0 died")):
        async with asyncio.TaskGroup() as tasks:
            over(tasks, [Dead()], slots=1)[0].fill()


class Named(SimulatedTeacher):
    """Keeps what it was asked; its scores are its name."""

    def __init__(self, name: str = ""):
        super().__init__()
        self.name, self.asked = name, []

    async def score(self, group):
        self.asked.append(group.id)
        await asyncio.sleep(0)
        return ("",), self.name


async def test_a_group_is_scored_by_the_teacher_its_prompt_names():
    named = ("math", "code", "math", "math")
    teachers = {"math": [Named("math 0"), Named("math 1")], "code": [Named("code 0")]}
    async with asyncio.TaskGroup() as tasks:
        source = [
            msgspec.structs.replace(p, teacher=t) for p, t in zip(Prompts(4), named, strict=True)
        ]
        admission, queue, _ = over(
            tasks, [Generator()], slots=4, needed=4, teachers=teachers, source=source
        )
        admission.fill()
        groups = [(await queue.take(0))[0] for _ in named]
    assert [teacher.asked for pool in teachers.values() for teacher in pool] == [
        ["0", "3"],
        ["2"],
        ["1"],
    ]
    scored = {ready.prompt.id: (ready.scores, ready.reference) for ready in groups}
    assert scored == {
        "0": ("math 0", None),
        "1": ("code 0", None),
        "2": ("math 1", None),
        "3": ("math 0", None),
    }


async def test_a_reference_scores_every_group_beside_its_teacher_and_verifier():
    meet = asyncio.Barrier(3)  # none of the three goes on before the others have begun

    class Meets(Named, SimulatedVerifier):
        async def score(self, group):
            await meet.wait()
            return await super().score(group)

        async def check(self, group):
            await meet.wait()
            return await super().check(group)

    references, both = [Meets("reference 0"), Meets("reference 1")], Meets()
    async with asyncio.TaskGroup() as tasks:
        admission, queue, _ = over(
            tasks,
            [Generator()],
            needed=2,
            teachers={"": [both]},
            references=references,
            verifier=both,
        )
        admission.fill()
        ready = [(await queue.take(0))[0] for _ in range(2)]
    assert {r.prompt.id: r.reference for r in ready} == {"0": "reference 0", "1": "reference 1"}


async def test_teachers_are_balanced_by_tokens_not_by_groups():
    # Tokens with the prompt's one: 901, 11, 501, 501, 11. Taking turns would give 901 + 501 + 11 =
    # 1413 against 512.
    lengths, scored = iter([900, 10, 500, 500, 10]), asyncio.Event()

    class HeavyTail(SimulatedGenerator):
        async def generate(self, prompt):
            meta, _ = await super().generate(prompt)
            spans = ((Span(version=0, start=0, end=next(lengths)),),)
            return msgspec.structs.replace(meta, spans=spans), prompt

    class Slow(SimulatedTeacher):
        def __init__(self):
            super().__init__()
            self.asked = []

        async def score(self, group):
            self.asked.append(group.id)
            await scored.wait()
            return ("",), None

    teachers = [Slow(), Slow()]
    async with asyncio.TaskGroup() as tasks:
        over(tasks, [HeavyTail()], slots=5, needed=5, teachers={"": teachers})[0].fill()
        await settle()
        # 912 and 1013 tokens
        assert [teacher.asked for teacher in teachers] == [["0", "4"], ["1", "2", "3"]]
        scored.set()


def half(until: int = 99) -> TeacherSamplingConfig:
    """Every second prompt is the teacher's, up to step `until`."""
    return TeacherSamplingConfig(share=0.5, full_until_step=until, until_step=until)


class Answering(Generator):
    """A generator that holds the teacher: its groups are marked as the teacher's answers."""

    async def generate(self, prompt):
        meta, group = await super().generate(prompt)
        return meta, msgspec.structs.replace(group, answer="the teacher's own")


class Judge(SimulatedTeacher, SimulatedVerifier):
    """Gives every response `reward`, and scores nothing that the teacher answered."""

    def __init__(self, reward: float | None = 1.0):
        super().__init__()
        self._reward = reward

    async def score(self, group):
        assert group.answer != "the teacher's own"
        return ("",), None

    async def check(self, group):
        return (Verdict(id=f"{group.id}#0", reward=self._reward),)


async def test_the_teacher_answers_its_prompts_itself_and_nobody_scores_them():
    student, own = Generator(), [Answering(), Answering()]
    async with asyncio.TaskGroup() as tasks:
        admission, queue, _ = over(
            tasks, [student], slots=8, needed=8, teachers={"": [Judge()]}, sampling=half(), own=own
        )
        admission.fill()
        await settle()
        groups = [(await queue.take(0))[0] for _ in range(8)]
    assert [p.id for p in student.served] == ["0", "2", "4", "6"]
    assert [[p.id for p in g.served] for g in own] == [["1", "5"], ["3", "7"]]  # the idlest of them
    assert [(g.prompt.id, g.scores) for g in groups if g.from_teacher] == [
        (id, None) for id in "1357"
    ]


@pytest.mark.parametrize(
    ("reward", "truncated", "policy", "cause"),
    [
        (0.0, False, "train", "teacher_wrong"),
        (0.999, False, "train", "teacher_wrong"),  # right is what has all of the reward
        (None, False, "train", "teacher_unknown"),
        (0.0, True, "drop", "teacher_wrong"),
        (1.0, True, "drop", "teacher_truncated"),
        (1.0, True, "mask", "teacher_truncated"),  # no token of it would be in the loss
        (1.0, True, "train", None),
    ],
)
async def test_a_teachers_answer_that_cannot_be_trained_is_dropped_and_the_student_asked_instead(
    reward, truncated, policy, cause
):
    student, own = Generator(), Answering(truncated=truncated)
    async with asyncio.TaskGroup() as tasks:
        admission, queue, slots = over(
            tasks,
            [student],
            slots=2,
            needed=2,
            verifier=Judge(reward),
            sampling=half(until=1),
            own=[own],
            truncated=policy,
        )
        admission.fill()
        await settle()
        served = [p.id for p in own.served]
        assert len(served) == len(set(served)) >= 1  # none is asked twice
        kept = [(await asyncio.wait_for(queue.take(0), 5))[0] for _ in range(2)]
        assert [g.from_teacher for g in kept] == [False, cause is None]
        assert queue.dropped == ({cause: len(served)} if cause else {})
        assert [p.id for p in student.served] == (["0", "1"] if cause else ["0"])
        assert slots.free == 0
        assert admission.needed == 0


class Several(Generator):
    """Groups of three responses; what it says of them is `failures`."""

    failures: tuple[str, ...] = ()

    async def generate(self, prompt):
        meta, group = await super().generate(prompt)
        changes = {name: getattr(meta, name) * 3 for name in ("spans", "truncated")}
        return msgspec.structs.replace(meta, **changes, failures=self.failures), group


class Refuses(SimulatedTeacher):
    """Has no score for the rollouts of these numbers, for these reasons."""

    def __init__(self, name: str = "", **causes: str):
        super().__init__()
        self.name, self.causes, self.asked = name, causes, 0

    async def score(self, group):
        self.asked += 1
        return tuple(self.causes.get(f"_{sample}", "") for sample in range(3)), self.name


async def scored(generator, **roles):
    """(samples and scores of the one group that is produced, events)."""
    events = []
    async with asyncio.TaskGroup() as tasks:
        admission, queue, _ = over(
            tasks, [generator], slots=1, needed=1, emit=lambda *event: events.append(event), **roles
        )
        admission.fill()
        (group,) = await asyncio.wait_for(queue.take(0), 5)
    return (group.samples, group.scores), events


async def test_a_rollout_without_a_score_is_left_out_and_said_and_the_others_go_on():
    (what, events) = await scored(
        Several(),
        teachers={"": [Refuses("scores", _1="0#1: sampled_logp[2] = nan")]},
        references=[Refuses("of the reference", _2="0#2: too long")],
    )
    assert what == ((0,), "scores")
    assert events == [
        ("failed", "teacher", f"0#1: sampled_logp[2] = nan; {LEFT_OUT}"),
        ("failed", "reference", f"0#2: too long; {LEFT_OUT}"),
    ]


LEFT_OUT = "its group goes on without it; further ones are counted"


async def test_a_response_that_failed_as_it_was_sampled_is_the_generator_s_failure():
    generator = Several()
    generator.failures = ("", "0#1: behaviour_logp[0] = nan", "")
    (what, events) = await scored(generator, teachers={"": [Refuses(_1="whatever")]})
    assert what[0] == (0, 2)
    assert events == [("failed", "generator", f"0#1: behaviour_logp[0] = nan; {LEFT_OUT}")]


async def test_what_one_replica_has_no_score_for_one_other_is_asked():
    bad, good = Refuses("bad", _0="nan", _1="nan"), Refuses("good")
    assert await scored(Several(), teachers={"": [bad, good]}) == (((0, 1, 2), "good"), [])
    # of two that refuse, the one that refuses less
    worse = [Refuses("two", _0="nan", _1="nan"), Refuses("one", _1="nan"), Refuses("three")]
    (what, _) = await scored(Several(), teachers={"": worse})
    assert (what, [each.asked for each in worse]) == (((0, 2), "one"), [1, 1, 0])


async def test_a_group_none_of_whose_rollouts_has_a_score_failed():
    refuses, events = Refuses(_0="nan", _1="nan", _2="nan"), []
    with pytest.RaisesGroup(
        pytest.RaisesExc(TooManyDropped, match=r"^2 groups in a row failed .2 teacher.*: nan$")
    ):
        async with asyncio.TaskGroup() as tasks:
            over(
                tasks,
                [Several()],
                slots=1,
                teachers={"": [refuses]},
                emit=lambda *event: events.append(event),
            )[0].fill()
    assert [event[:2] for event in events] == [("failed", "teacher")]  # the first is said


def test_of_what_another_number_of_rollouts_was_scored_nothing_is_trained():
    class Short(SimulatedTeacher):
        async def score(self, group):
            return ("",), None

    async def main():
        async with asyncio.TaskGroup() as tasks:
            over(tasks, [Several()], slots=1, teachers={"": [Short()]})[0].fill()

    with pytest.RaisesGroup(pytest.RaisesExc(TooManyDropped, match="1 of 3 scored")):
        virtual(main())


@pytest.mark.parametrize("role", ["generator", "reference", "verifier"])
def test_an_error_by_name_costs_a_group_and_never_at_once_the_run(role):
    class Odd(Several, SimulatedVerifier):
        async def generate(self, prompt):
            if role == "generator" and prompt.id == "0":
                raise WireError("0: it is odd")
            return await super().generate(prompt)

        async def score(self, group):
            if role == "reference" and group.id == "0":
                raise WireError("0: it is odd")
            return ("",) * 3, None

        async def check(self, group):
            if role == "verifier" and group.id == "0":
                raise WireError("0: it is odd")
            return await super().check(group)

    odd, events = Odd(), []

    async def main():
        async with asyncio.TaskGroup() as tasks:
            admission, queue, _ = over(
                tasks,
                [odd],
                needed=1,
                attempts=1,
                teachers={"": [Refuses()]},
                references=[odd],
                verifier=odd,
                emit=lambda *event: events.append(event),
            )
            admission.fill()
            (group,) = await asyncio.wait_for(queue.take(0), 5)
        return group, queue

    group, queue = virtual(main())
    assert group.prompt.id == "1" and queue.dropped.keys() == {"failed"}
    assert [event[:2] for event in events] == [("failed", role)]
    assert "0: it is odd" in events[0][2]
