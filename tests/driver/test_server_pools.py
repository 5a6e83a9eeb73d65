"""A pool whose members ask somebody's servers: known by address, away for a while, other ones; in
virtual time."""

import asyncio

import numpy as np
import pytest

from async_opd.cli.demo import CONFIG as DEMO
from async_opd.config.load import load
from async_opd.config.precision import with_dtypes
from async_opd.core.errors import ActorLost, ScorerDiffers
from async_opd.core.roles import Roles
from async_opd.driver.pools import Pools
from async_opd.driver.replica_pool import ReplicaPool, Servers
from async_opd.driver.scorer_probe import ScorerProbe
from async_opd.telemetry.metrics import Meter
from tests.simulated.roles import (
    SimulatedGenerator,
    SimulatedLearner,
    SimulatedTeacher,
    SimulatedVerifier,
)
from tests.simulated.virtual_time import virtual

A, B, C = "http://a:8000", "http://b:8000", "http://c:8000"
PATIENCE_S = 300.0
SOUND = np.linspace(-9, -1, 12, dtype=np.float32).reshape(4, 3)


class World:
    """Servers that are up or down, and what each says of the probe."""

    def __init__(self):
        self.down: set[str] = set()
        self.says: dict[str, np.ndarray] = {}
        self.tried: list[tuple[float, str]] = []
        self.asked: list[tuple[str, str]] = []

    async def spawn(self, url: str) -> "Asker":
        self.tried.append((asyncio.get_running_loop().time(), url))
        asker = Asker(self, url)
        await asker.check_health()
        return asker


class Asker:
    """Answers after ten seconds with its server's address."""

    def __init__(self, world: World, url: str):
        self.world, self.url = world, url

    async def check_health(self):
        if self.url in self.world.down:
            raise ActorLost(f"{self.url}: cannot be reached")

    async def work(self, item: str) -> str:
        self.world.asked.append((self.url, item))
        await asyncio.sleep(10)
        await self.check_health()
        return self.url

    async def probe(self):
        return self.world.says.get(self.url, SOUND)

    def kill(self): ...


def play(scene, urls=(A, B), absent=(), probe=None):
    """What `scene(pool, world, events)` returns; of `urls` those in `absent` are still to come."""
    world, events = World(), []

    async def main():
        pool = ReplicaPool(
            "teacher",
            [None if url in absent else Asker(world, url) for url in urls],
            spawn=world.spawn,
            welcome=probe.welcome if probe else None,
            servers=Servers(tuple(urls), PATIENCE_S),
            emit=lambda what, who, why: events.append((what, who, why)),
        )
        async with asyncio.TaskGroup() as tasks:
            pool.start(tasks, every_s=1.0)
            result = await scene(pool, world, events)
            pool.stop()
        return result

    return virtual(main())


def serving(pool) -> list[str]:
    return [replica.name for replica in pool.serving]


def test_a_server_that_goes_is_named_by_its_address_and_serves_again_once_it_is_back():
    async def scene(pool, world, events):
        world.down.add(A)
        answers = await asyncio.gather(*(pool.ask(Asker.work, f"{n}") for n in range(4)))
        without = serving(pool)
        await asyncio.sleep(50)
        world.down.clear()
        await asyncio.sleep(100)
        return answers, without, serving(pool), events

    answers, without, back, events = play(scene)
    assert answers == [B] * 4 and without == [f"teacher {B}"]
    assert back == [f"teacher {A}", f"teacher {B}"]
    assert [(what, who) for what, who, _ in events] == [
        ("lost", f"teacher {A}"),
        ("did not start", f"teacher {A}"),
        ("serves", f"teacher {A}"),
    ]
    assert all(A in why for _, _, why in events[:2])


def test_requests_go_to_the_server_with_the_least_in_flight():
    async def scene(pool, world, events):
        await asyncio.gather(*(pool.ask(Asker.work, f"{n}") for n in range(6)))
        return [url for url, _ in world.asked]

    assert sorted(play(scene)) == [A] * 3 + [B] * 3


def test_where_every_server_is_away_requests_wait_as_long_as_an_actor_may_take_to_start():
    async def scene(pool, world, events):
        world.down |= {A, B}
        asking = asyncio.ensure_future(pool.ask(Asker.work, "x"))
        await asyncio.sleep(PATIENCE_S - 50)
        world.down.clear()
        return await asking

    assert play(scene) in (A, B)


def test_where_every_server_stays_away_the_run_ends_and_names_them():
    async def scene(pool, world, events):
        world.down |= {A, B}
        await pool.ask(Asker.work, "x")

    with pytest.raises(ExceptionGroup) as ended:
        play(scene)
    lost = ended.value.exceptions[0]
    assert isinstance(lost, ActorLost) and "http://" in str(lost) and "in a row" in str(lost)


def test_looks_at_a_server_that_is_away_are_ever_more_rare():
    async def scene(pool, world, events):
        world.down.add(A)
        await asyncio.sleep(1000)
        times = [time for time, url in world.tried if url == A]
        return np.diff(times)

    gaps = play(scene)
    assert 8 <= len(gaps) <= 12 and (gaps[1:] >= gaps[:-1]).all() and gaps[-1] > 100


def test_one_that_was_away_when_the_run_began_is_waited_for_beside_the_others():
    async def scene(pool, world, events):
        first = await pool.ask(Asker.work, "x")
        await asyncio.sleep(5)
        return first, serving(pool)

    first, later = play(scene, absent={A})
    assert first == B and later == [f"teacher {A}", f"teacher {B}"]


def test_where_all_are_away_when_a_run_starts_again_they_are_waited_for():
    async def scene(pool, world, events):
        world.down |= {A, B}
        asking = asyncio.ensure_future(pool.ask(Asker.work, "x"))
        await asyncio.sleep(PATIENCE_S - 50)
        world.down.clear()
        return await asking

    assert play(scene, absent={A, B}) in (A, B)


def test_servers_come_and_go_and_what_one_that_goes_has_in_hand_is_asked_of_others():
    async def scene(pool, world, events):
        asking = [asyncio.ensure_future(pool.ask(Asker.work, f"{n}")) for n in range(2)]
        await asyncio.sleep(5)
        pool.ask_servers([B, C])
        assert pool.urls == [B, C] and pool.size == 2
        answers = await asyncio.gather(*asking)
        return answers, serving(pool), events

    answers, left, events = play(scene)
    assert sorted(answers) in ([B, B], [B, C])
    assert left == [f"teacher {B}", f"teacher {C}"]
    assert ("scaled", "teacher", f"{A}, {B} -> {B}, {C}") in events
    assert ("lost", f"teacher {A}", "its server is dropped") in events


def test_one_that_was_dropped_and_is_asked_for_again_is_the_same_member():
    async def scene(pool, world, events):
        pool.ask_servers([B])
        await asyncio.sleep(2)
        pool.ask_servers([B, A])
        await asyncio.sleep(2)
        return serving(pool), [url for _, url in world.tried]

    assert play(scene) == ([f"teacher {A}", f"teacher {B}"], [A])


def test_one_that_is_dropped_while_it_is_away_is_looked_at_no_more():
    async def scene(pool, world, events):
        world.down.add(A)
        await asyncio.sleep(20)
        pool.ask_servers([B])
        count = len(world.tried)
        await asyncio.sleep(3000)
        return len(world.tried) - count, serving(pool)

    assert play(scene) == (0, [f"teacher {B}"])


def other(nats: float) -> np.ndarray:
    return SOUND - nats


def test_two_servers_that_differ_from_the_start_end_the_run_by_the_second_s_address():
    probe = ScorerProbe("bfloat16", moving=False, served=True)

    async def scene(pool, world, events):
        world.says[B] = other(0.5)
        await probe.compare(pool)
        await asyncio.sleep(60)

    with pytest.raises(ExceptionGroup) as ended:
        play(scene, probe=probe)
    differs = ended.value.exceptions[0]
    assert isinstance(differs, ScorerDiffers) and f"teacher {B}" in str(differs)


def test_a_server_that_comes_back_as_another_model_is_left_out_and_the_run_goes_on():
    probe = ScorerProbe("bfloat16", moving=False, served=True)

    async def scene(pool, world, events):
        await probe.compare(pool)
        world.down.add(B)
        await asyncio.sleep(5)
        world.says[B] = other(0.5)
        world.down.clear()
        await asyncio.sleep(500)
        left_out = serving(pool)
        world.says.clear()
        await asyncio.sleep(600)
        return left_out, serving(pool), events

    left_out, back, events = play(scene, probe=probe)
    assert left_out == [f"teacher {A}"] and back == [f"teacher {A}", f"teacher {B}"]
    why = [why for what, who, why in events if what == "did not start"]
    assert any("5.00e-01 nats" in each and B in each for each in why)


def test_a_server_whose_model_changes_while_it_serves_is_left_out():
    probe = ScorerProbe("bfloat16", moving=False, served=True)

    async def scene(pool, world, events):
        await probe.compare(pool)
        world.says[A] = other(0.5)
        await probe.compare(pool)
        await asyncio.sleep(500)
        return serving(pool)

    assert play(scene, probe=probe) == [f"teacher {B}"]


@pytest.mark.parametrize(
    ("settings", "bound"), [([], 0.2), (["teacher.dtype=float32"], 1e-3)], ids=["", "float32"]
)
@pytest.mark.parametrize("gpus", [False, True])
def test_how_far_servers_may_differ_goes_by_what_they_compute_in_and_not_by_our_cluster(
    settings, bound, gpus
):
    servers = ["teacher.backend=server", f'teacher.urls=["{A}", "{B}/v1"]']
    config = with_dtypes(load(DEMO, [*servers, *settings]), gpus=gpus)
    meter, said = Meter([]), []
    roles = Roles(
        generators=[SimulatedGenerator()],
        teachers={"": [SimulatedTeacher(), None]},
        verifier=SimulatedVerifier(),
        learner=SimulatedLearner(),
    )
    pools = Pools(config, roles, meter, lambda *event: said.append(event), welcome=None)
    (probe, pool), *_ = pools._probes
    assert (probe._bound, probe._served, pool._patience_s) == (bound, True, config.timeout.start_s)
    assert pool.urls == [A, B] and serving(pool) == [f"teacher {A}"]
    assert [time._name for time in meter._actors["teachers"]] == [f"teacher {A}"]
