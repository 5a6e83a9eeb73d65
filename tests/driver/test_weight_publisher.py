import asyncio

import numpy as np
import pytest

from async_opd.core.errors import ActorLost, ParityError, SyncFailed, TimedOut
from async_opd.core.ports import Generator
from async_opd.core.weights import WeightGroup
from async_opd.driver.replica_pool import ReplicaPool
from async_opd.driver.weight_publisher import WeightPublisher
from async_opd.telemetry.spans import ActorTime
from tests.simulated.roles import LOGP, Prompts, SimulatedGenerator, SimulatedLearner
from tests.simulated.runs import replica

BESIDE = LOGP + 0.01 * (np.arange(len(LOGP)) == 1).astype(np.float32)  # of the second token


def publisher_of(learner, *generators, every: int = 1) -> WeightPublisher:
    return WeightPublisher(
        replica(learner), ReplicaPool("generator", generators), parity_every=every, tolerance=1e-3
    )


async def test_prompts_are_admitted_while_every_generator_is_paused_at_the_new_version():
    generators, seen = (SimulatedGenerator(), SimulatedGenerator()), []
    publisher = publisher_of(SimulatedLearner(), *generators)
    await publisher.publish(3, admit=lambda: seen.extend((g.version, g.paused) for g in generators))
    assert seen == [(3, True), (3, True)]
    assert [g.paused for g in generators] == [False, False]


@pytest.mark.parametrize(
    ("versions", "probed"),
    [
        ((0, 1, 2, 3, 4), (0, 2, 4)),
        ((7, 8, 9, 10), (7, 8, 10)),  # gone on with, on engines that nobody has probed
        ((0, 3, 6, 7, 9, 10), (0, 3, 6, 9, 10)),  # not all go out: the first behind a multiple
    ],
)
async def test_the_probe_runs_at_first_and_behind_every_kth_version(versions, probed):
    publisher = publisher_of(SimulatedLearner(), SimulatedGenerator(), every=2)
    gaps = [await publisher.publish(version, admit=lambda: None) for version in versions]
    expected = [0.0 if version in probed else None for version in versions]
    assert [gap and gap.largest for gap in gaps] == expected


async def test_a_generator_that_disagrees_with_the_learner_stops_the_run():
    class Disagrees(SimulatedLearner):
        async def logprobs(self, *ids):
            return np.tile(BESIDE, len(ids) // 2)

    publisher = publisher_of(Disagrees(), SimulatedGenerator())
    with pytest.raises(
        ParityError, match=r"differ by 1\.00e-02 nats from the learner's at version 1"
    ):
        await publisher.publish(1, admit=lambda: None)


async def test_a_log_prob_that_is_not_a_number_is_no_agreement():
    class Broken(SimulatedLearner):
        async def logprobs(self, *ids):
            return np.tile(LOGP * np.nan, len(ids) // 2)

    with pytest.raises(ParityError):
        await publisher_of(Broken(), SimulatedGenerator()).publish(1, admit=lambda: None)


async def test_a_generator_that_samples_under_another_version_stops_the_run():
    class Stuck(SimulatedGenerator):
        async def update(self, version, layout, oldest): ...

    with pytest.raises(ParityError, match="expected version 1"):
        await publisher_of(SimulatedLearner(), Stuck()).publish(1, admit=lambda: None)


async def test_a_failed_update_admits_nothing_and_leaves_the_generators_paused():
    class Aborted(SimulatedGenerator):
        async def update(self, version, layout, oldest):
            await super().update(version, layout, oldest)
            raise SyncFailed("generator 0 did not take version 1")

    generator, admitted = Aborted(), []
    publisher = publisher_of(SimulatedLearner(), generator)
    with pytest.raises(SyncFailed, match="did not take version 1"):
        await publisher.publish(1, admit=lambda: admitted.append(1))
    assert (generator.paused, admitted) == (True, [])


class Breaks(SimulatedGenerator):
    """Dies in the update to `fatal`; notes the groups it joined and the versions it was sent."""

    def __init__(self, fatal: int | None = None):
        super().__init__()
        self.fatal, self.joined, self.sent, self.killed = fatal, [], [], False

    async def join_group(self, group):
        self.joined.append((group.port, group.rank_offset - 1))

    async def update(self, version, layout, oldest):
        self.sent.append((version, oldest))
        if version == self.fatal:
            raise ActorLost("generator died during update")
        await super().update(version, layout, oldest)

    def kill(self):
        self.killed = True


class Epochs(SimulatedLearner):
    """Counts groups; a broadcast fails where a member did."""

    def __init__(self):
        super().__init__()
        self.groups = []

    async def open_group(self, generators):
        self.groups.append(generators)
        epoch, world = len(self.groups), 1 + generators
        return [WeightGroup("localhost", epoch, 1 + i, world, 1, 1) for i in range(generators)]


async def test_a_generator_that_dies_in_a_broadcast_is_retired_and_a_new_group_gets_that_version():
    generators = [Breaks(), Breaks(fatal=1), Breaks()]
    learner, pool = Epochs(), ReplicaPool("generator", generators)
    publisher = WeightPublisher(replica(learner), pool, parity_every=1, tolerance=1e-3)
    await publisher.publish(0, admit=lambda: None)
    assert (await publisher.publish(1, admit=lambda: None)).largest == 0.0
    assert learner.groups == [3, 2]
    assert [each.name for each in pool.serving] == ["generator 0", "generator 2"]
    assert [g.killed for g in generators] == [False, True, False]
    first, _, last = generators
    assert first.joined == [(1, 0), (2, 0)]
    assert last.joined == [(1, 2), (2, 1)]
    assert first.sent == last.sent == [(0, 0), (1, 0), (1, 0)]
    assert (first.version, first.paused, last.version, last.paused) == (1, False, 1, False)


async def test_a_version_that_no_group_takes_ends_in_the_cause_after_three_tries():
    class Refuses(Breaks):
        async def update(self, version, layout, oldest):
            self.sent.append(version)
            raise SyncFailed("generator 0 did not take version 1")

    generator = Refuses()
    with pytest.raises(SyncFailed, match="did not take version 1"):
        await publisher_of(SimulatedLearner(), generator).publish(1, admit=lambda: None)
    assert generator.sent == [1, 1, 1]
    assert len(generator.joined) == 3  # a new group each time


async def test_a_learner_that_dies_in_a_broadcast_is_not_tried_again():
    class Dies(SimulatedLearner):
        async def send_weights(self):
            raise ActorLost("learner rank 0 died")

    generator = Breaks()
    with pytest.raises(ActorLost, match="learner rank 0 died"):
        await publisher_of(Dies(), generator).publish(1, admit=lambda: None)
    assert generator.sent == [(1, 0)]


async def test_a_newcomer_holds_the_live_version_and_passes_the_probe_though_none_is_due():
    old, new, pool_learner = Breaks(), Breaks(), Epochs()
    pool = ReplicaPool("generator", [old])
    publisher = WeightPublisher(replica(pool_learner), pool, parity_every=100, tolerance=1e-3)
    await publisher.publish(7, admit=lambda: None)
    newcomers = [replica(new, "generator 1", 1)]
    assert (await publisher.publish(7, admit=lambda: None, newcomers=newcomers)).largest == 0.0
    assert (pool_learner.groups, new.version, new.paused) == ([1, 2], 7, False)

    class Disagrees(Epochs):
        async def logprobs(self, *ids):
            return np.tile(BESIDE, len(ids) // 2)

    publisher = WeightPublisher(replica(Disagrees()), pool, parity_every=100, tolerance=1e-3)
    with pytest.raises(ParityError):
        await publisher.publish(7, admit=lambda: None, newcomers=[replica(new, "generator 1", 1)])


async def test_a_probe_that_failed_is_due_again_for_those_who_were_there_before_a_newcomer():
    class Disagrees(Epochs):
        async def logprobs(self, *ids):
            return np.tile(LOGP if self.groups == [1] else BESIDE, len(ids) // 2)

    learner, pool = Disagrees(), ReplicaPool("generator", [Breaks()])
    publisher = WeightPublisher(replica(learner), pool, parity_every=4, tolerance=1e-3)
    await publisher.publish(0, admit=lambda: None)
    newcomer = replica(Breaks(), "generator 1", 1)
    with pytest.raises(ParityError):
        await publisher.publish(4, admit=lambda: None, newcomers=[newcomer])
    newcomer.leave("it may have been the one that differs")
    with pytest.raises(ParityError):
        await publisher.publish(4, admit=lambda: None)


async def test_with_every_generator_lost_the_learner_goes_on_alone():
    learner, pool = Epochs(), ReplicaPool("generator", [Breaks(fatal=1)])
    publisher = WeightPublisher(replica(learner), pool, parity_every=1, tolerance=1e-3)
    admitted = []
    assert await publisher.publish(1, admit=lambda: admitted.append(1)) is None
    assert (learner.groups, pool.serving, admitted) == ([1], [], [1])


async def test_where_stale_groups_are_dropped_an_update_cuts_those_that_are_over_age():
    generator = Breaks()
    publisher = WeightPublisher(
        replica(SimulatedLearner()),
        ReplicaPool("generator", [generator]),
        parity_every=9,
        tolerance=1e-3,
        max_age=2,
    )
    for version in (1, 2, 3, 7):
        await publisher.publish(version, admit=lambda: None)
    assert generator.sent == [(1, 0), (2, 0), (3, 1), (7, 5)]


async def test_the_engine_waits_for_the_requests_that_were_sent_not_for_one_given_up_before():
    class Expects(Breaks):
        async def generate(self, prompt):
            self.served.append(prompt)

        async def resume(self, expected):
            self.expected = expected
            await super().resume(expected)

    generator = Expects()
    generator.served = []
    pool = ReplicaPool("generator", [generator])
    publisher = WeightPublisher(replica(SimulatedLearner()), pool, parity_every=9, tolerance=1e-3)
    asking = []

    def admit():
        ask = pool.ask
        asking.extend(asyncio.ensure_future(ask(Generator.generate, at)) for at in range(3))
        asyncio.get_running_loop().call_soon(asking[1].cancel)  # between its task and its call

    await publisher.publish(1, admit)
    await asyncio.wait(asking)
    assert (generator.served, generator.expected) == ([0, 2], 2 + 1)  # and the probe


@pytest.mark.parametrize(
    ("waits", "order"),
    [
        (True, ["update", "admit", "sent", "resume 2"]),
        (False, ["update", "resume 0", "admit", "sent"]),
    ],
    ids=["synchronous", "asynchronous"],
)
async def test_only_a_synchronous_run_has_its_engines_wait_for_the_prompts_behind_an_update(
    waits, order
):
    class Notes(SimulatedGenerator):
        async def generate(self, prompt):
            done.append("sent")
            return await super().generate(prompt)

        async def update(self, version, layout, oldest):
            done.append("update")
            await super().update(version, layout, oldest)

        async def resume(self, expected):
            done.append(f"resume {expected}")
            await super().resume(expected)

    def admit():
        done.append("admit")
        asking.append(asyncio.ensure_future(pool.ask(Generator.generate, next(iter(Prompts())))))

    done, asking = [], []
    pool = ReplicaPool("generator", [Notes()])
    publisher = WeightPublisher(
        replica(SimulatedLearner()), pool, parity_every=1, tolerance=1e-3, waits=waits
    )
    gap = await publisher.publish(1, admit)
    assert gap and gap.largest == 0.0
    await asyncio.wait(asking)
    assert done == order


async def test_a_generator_that_is_lost_as_it_runs_on_is_retired_and_prompts_go_to_the_others():
    class Dies(SimulatedGenerator):
        async def resume(self, expected):
            raise ActorLost("generator 0 died")

    admitted = []
    pool = ReplicaPool("generator", [Dies(), SimulatedGenerator()])
    publisher = WeightPublisher(
        replica(SimulatedLearner()), pool, parity_every=1, tolerance=1e-3, waits=False
    )
    await publisher.publish(1, lambda: admitted.extend(each.name for each in pool.serving))
    assert admitted == ["generator 1"]


async def test_a_generator_that_runs_on_is_no_longer_syncing_whoever_is_slow_to():
    class Slow(SimulatedGenerator):
        async def resume(self, expected):
            await resumes.wait()
            await super().resume(expected)

    resumes, clock = asyncio.Event(), asyncio.get_running_loop().time
    times = [ActorTime(clock) for _ in range(2)]
    pool = ReplicaPool(
        "generator", [SimulatedGenerator(), Slow()], actor_time=lambda name: times[int(name[-1])]
    )
    publisher = WeightPublisher(replica(SimulatedLearner()), pool, parity_every=9, tolerance=1e-3)
    publishing = asyncio.ensure_future(publisher.publish(1, admit=lambda: None))
    await asyncio.sleep(0.05)
    assert [time._state for time in times] == ["starved", "syncing"]
    resumes.set()
    await publishing
    assert [time._state for time in times] == ["starved", "starved"]


class Takes(Breaks):
    """Takes an update until it is let go."""

    def __init__(self):
        super().__init__()
        self.begun, self.go = asyncio.Event(), asyncio.Event()

    async def update(self, version, layout, oldest):
        self.begun.set()
        await self.go.wait()
        await super().update(version, layout, oldest)


async def test_a_pool_that_shrinks_in_an_update_loses_nobody_before_its_end():
    generators, learner = [Takes(), Takes()], Epochs()
    pool = ReplicaPool("generator", generators)
    publisher = WeightPublisher(replica(learner), pool, parity_every=1, tolerance=1e-3)
    publishing = asyncio.ensure_future(publisher.publish(1, admit=lambda: None))
    await generators[1].begun.wait()
    pool.resize(1)
    assert (len(pool.serving), [each.killed for each in generators]) == (2, [False, False])
    for each in generators:
        each.go.set()
    assert (await publishing).largest == 0.0
    assert [each.killed for each in generators] == [False, True]
    assert learner.groups == [2]  # one broadcast, which nobody broke off
    assert (generators[1].version, generators[0].paused) == (1, False)
    await publisher.publish(2, admit=lambda: None)
    assert learner.groups == [2, 1]


async def test_a_generator_that_dies_in_an_update_is_given_up_while_it_runs():
    generators, learner = [Takes(), Takes()], Epochs()
    pool = ReplicaPool("generator", generators)
    publisher = WeightPublisher(replica(learner), pool, parity_every=1, tolerance=1e-3)
    publishing = asyncio.ensure_future(publisher.publish(1, admit=lambda: None))
    await generators[1].begun.wait()
    pool.retire(pool.serving[1], "generator 1 died")
    assert (len(pool.serving), generators[1].killed) == (1, True)
    generators[0].go.set()
    assert (await publishing).largest == 0.0
    assert learner.groups == [2, 1]


class Hangs(Epochs):
    """Does not come back from the broadcast of version 1 until it leaves its group."""

    def __init__(self, leaves: bool):
        super().__init__()
        self.leaves, self.left = leaves, 0

    async def send_weights(self):
        if len(self.groups) == 1 and self.groups != [1]:
            raise TimedOut("learner rank 0, send_weights: no answer in 40 s")

    async def leave_group(self):
        self.left += 1
        if not self.leaves:
            raise TimedOut("learner rank 0, leave_group: no answer in 20 s")


async def test_a_learner_that_hangs_in_a_broadcast_leaves_the_group_and_goes_on_in_another():
    generators = [Breaks(), Breaks(fatal=0)]
    learner, pool = Hangs(leaves=True), ReplicaPool("generator", generators)
    publisher = WeightPublisher(replica(learner), pool, parity_every=1, tolerance=1e-3)
    gap = await publisher.publish(0, admit=lambda: None)
    assert gap and gap.largest == 0.0
    assert (learner.groups, learner.left) == ([2, 1], 1)
    assert [each.name for each in pool.serving] == ["generator 0"]


async def test_a_learner_that_cannot_leave_the_group_is_lost():
    publisher = publisher_of(Hangs(leaves=False), Breaks(), Breaks())
    with pytest.raises(TimedOut, match="leave_group"):
        await publisher.publish(0, admit=lambda: None)
