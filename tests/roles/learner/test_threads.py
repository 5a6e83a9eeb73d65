import threading

import pytest
from torch.distributed import HashStore

from async_opd.roles.learner import threads


@pytest.mark.parametrize(
    ("limit", "counted"),
    [("300000 100000", 3), ("50000 100000", 1), ("max 100000", 16), (None, 16)],
)
def test_cores_are_those_of_the_container(tmp_path, monkeypatch, limit, counted):
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda process: set(range(16)))
    file = tmp_path / "cpu.max"
    if limit:
        file.write_text(limit)
    assert threads.cores(file) == counted


def test_ranks_of_one_node_share_its_cores(monkeypatch):
    monkeypatch.setattr(threads, "cores", lambda: 16)
    store, counts = HashStore(), {}
    names = {"rank 0": "a", "rank 1": "b", "rank 2": "a"}
    monkeypatch.setattr(
        threads.socket, "gethostname", lambda: names[threading.current_thread().name]
    )

    def ask(rank):
        counts[rank] = threads.optimizer_threads(store, rank, 3)

    ranks = [threading.Thread(target=ask, args=(i,), name=f"rank {i}") for i in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert counts == {0: 8, 1: 16, 2: 8}
