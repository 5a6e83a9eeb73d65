import pytest

from async_opd import run as runs
from async_opd.errors import ActorLost, AsyncOpdError, DataError


def test_an_earlier_run_directory_is_kept_beside_the_new_one(tmp_path):
    for _ in range(3):
        with runs.new_dir(tmp_path / "run") as made:
            made.joinpath("mine").touch()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "run.1", "run.2"]
    assert all((p / "mine").exists() for p in tmp_path.iterdir())


def left_by(path, error: AsyncOpdError, *files: str) -> list[str]:
    """What is under the grandparent of `path` when a run there has written `files` and ended with `error`."""
    with pytest.raises(type(error)), runs.new_dir(path) as made:
        for file in ("config.json", *files):
            made.joinpath(file).touch()
        raise error
    return sorted(str(p.relative_to(path.parent.parent)) for p in path.parent.parent.rglob("*"))


def test_a_mistake_found_before_the_first_prompt_leaves_everything_as_it_was(tmp_path):
    assert left_by(tmp_path / "runs" / "a", DataError("no such column")) == []
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "mine").touch()
    assert left_by(tmp_path / "runs" / "a", DataError("no such column")) == ["runs", "runs/a", "runs/a/mine"]


def test_a_run_that_failed_or_had_begun_keeps_its_directory(tmp_path):
    lost = left_by(tmp_path / "runs" / "a", ActorLost("teacher 0"))
    assert lost == ["runs", "runs/a", "runs/a/config.json"]
    begun = left_by(tmp_path / "runs" / "b", DataError("row 7"), "ledger.jsonl")
    assert begun == [*lost, "runs/b", "runs/b/config.json", "runs/b/ledger.jsonl"]
