from async_opd.driver.replica_pool import Pool
from async_opd.driver.self_teachers import Followers


class Says:
    """A learner or a teacher that notes what it is asked to do, and when."""

    def __init__(self, name: str, notes: list[str]):
        self.name, self.notes = name, notes

    async def save(self, folder):
        self.notes.append(f"{self.name} saves {folder}")

    async def load(self, folder):
        self.notes.append(f"{self.name} loads {folder}")

    def kill(self): ...


async def test_every_replica_reads_what_was_saved_for_it_at_its_own_steps():
    notes = []
    learner, *teachers = (Says(name, notes) for name in ("learner", "a", "b", "c"))
    pools = {2: [Pool("a", teachers[:2])], 3: [Pool("b", teachers[2:])]}
    followers = Followers(learner, pools, "here")
    found = {}
    for version in range(1, 7):
        await followers.follow(version)
        found[version] = [note.removesuffix(" here") for note in notes]
        notes.clear()
    both = ["learner saves", "a loads", "b loads"]
    assert found == {
        1: [],
        2: both,
        3: ["learner saves", "c loads"],
        4: both,
        5: [],
        6: [*both, "c loads"],
    }


async def test_without_a_self_teacher_nothing_is_saved():
    notes = []
    await Followers(Says("learner", notes), {}, "here").follow(1)
    assert notes == []
