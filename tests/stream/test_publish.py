import numpy as np
import pytest

from async_opd.errors import ActorLost, ParityError, SyncFailed
from async_opd.stream.publish import Publisher
from tests.fakes import LOGP, FakeGenerator, FakeLearner


async def connected(learner, *generators, every: int = 1) -> Publisher:
    publisher = Publisher(learner, generators, parity_every=every, tolerance=1e-3)
    await publisher.connect()
    return publisher


async def test_prompts_are_admitted_while_every_generator_is_paused_at_the_new_version():
    generators, seen = (FakeGenerator(), FakeGenerator()), []
    publisher = await connected(FakeLearner(), *generators)
    await publisher.publish(3, admit=lambda: seen.extend((g.version, g.paused) for g in generators))
    assert seen == [(3, True), (3, True)]
    assert [g.paused for g in generators] == [False, False]


async def test_the_probe_runs_at_every_kth_version():
    publisher = await connected(FakeLearner(), FakeGenerator(), every=2)
    assert [await publisher.publish(v, admit=lambda: None) for v in (1, 2, 3, 4)] == [None, 0.0, None, 0.0]


async def test_a_generator_that_disagrees_with_the_learner_stops_the_run():
    class Disagrees(FakeLearner):
        async def logprobs(self, prompt_ids, response_ids):
            return LOGP + np.array([0, 0.01], np.float32)

    publisher = await connected(Disagrees(), FakeGenerator())
    with pytest.raises(ParityError, match=r"differ by 1\.00e-02 nats from the learner's at version 1"):
        await publisher.publish(1, admit=lambda: None)


async def test_a_log_prob_that_is_not_a_number_is_no_agreement():
    class Broken(FakeLearner):
        async def logprobs(self, prompt_ids, response_ids):
            return LOGP * np.nan

    with pytest.raises(ParityError):
        await (await connected(Broken(), FakeGenerator())).publish(1, admit=lambda: None)


async def test_a_generator_that_samples_under_another_version_stops_the_run():
    class Stuck(FakeGenerator):
        async def update(self, version, update_info): ...

    with pytest.raises(ParityError, match="expected version 1"):
        await (await connected(FakeLearner(), Stuck())).publish(1, admit=lambda: None)


async def test_a_failed_update_admits_nothing_and_leaves_the_generators_paused():
    class Aborted(FakeGenerator):
        async def update(self, version, update_info):
            self.paused = True
            raise SyncFailed("generator 0 did not take version 1")

    generator, admitted = Aborted(), []
    publisher = await connected(FakeLearner(), generator)
    with pytest.raises(SyncFailed, match="did not take version 1"):
        await publisher.publish(1, admit=lambda: admitted.append(1))
    assert (generator.paused, admitted) == (True, [])


async def test_an_engine_found_dead_after_a_failed_update_is_what_is_named():
    class Dead(FakeGenerator):
        async def update(self, version, update_info):
            raise SyncFailed("broke off")

        async def check_health(self):
            raise ActorLost("generator 0: its engine died")

    with pytest.raises(ActorLost, match="its engine died"):
        await (await connected(FakeLearner(), Dead())).publish(1, admit=lambda: None)
