from async_opd.driver.replica_pool import ReplicaPool
from async_opd.driver.self_teachers import SelfTeachers
from tests.simulated.runs import replica


class Says:
    """A learner or a teacher that notes what it is asked to do, and when."""

    def __init__(self, name: str, notes: list[str]):
        self.name, self.notes = name, notes

    async def save_whole(self, folder):
        self.notes.append(f"{self.name} saves {folder}")

    async def load(self, folder):
        self.notes.append(f"{self.name} loads {folder}")

    def kill(self): ...


async def test_every_replica_reads_what_was_saved_for_it_at_its_own_steps():
    notes = []
    learner, *teachers = (Says(name, notes) for name in ("learner", "a", "b", "c"))
    pools = {2: [ReplicaPool("a", teachers[:2])], 3: [ReplicaPool("b", teachers[2:])]}
    self_teachers = SelfTeachers(replica(learner), pools, "here")
    noted = {}
    for version in range(1, 7):
        await self_teachers.follow(version)
        noted[version] = [note.removesuffix(" here") for note in notes]
        notes.clear()
    both = ["learner saves", "a loads", "b loads"]
    assert noted == {
        1: [],
        2: both,
        3: ["learner saves", "c loads"],
        4: both,
        5: [],
        6: [*both, "c loads"],
    }


async def test_without_a_self_teacher_nothing_is_saved():
    notes = []
    await SelfTeachers(replica(Says("learner", notes)), {}, "here").follow(1)
    assert notes == []
