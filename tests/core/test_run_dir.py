"""Every way to name a run or one of its checkpoints leads to that run, or is refused by name; a
file of lines can be read while it is written."""

import random
import shutil
from pathlib import Path

import msgspec
import pytest

from async_opd.cli.demo import CONFIG as DEMO
from async_opd.cli.train import to_resume
from async_opd.config.load import load
from async_opd.core import run_dir
from async_opd.core.errors import CheckpointError, RunMissing
from async_opd.core.run_dir import decode_row, read_back, read_lines, run_of
from async_opd.driver.checkpoints import Checkpoints, RunState


def make_run(run: Path) -> Path:
    """A run with the checkpoints of steps 50 and 100."""
    run.mkdir(parents=True)
    (run / "config.json").write_bytes(msgspec.json.encode(load(DEMO, ["run.steps=200"])))
    checkpoints = Checkpoints(run, keep=2)
    for step in (50, 100):
        model = checkpoints.begin(step) / "model"
        model.mkdir()
        (model / "config.json").write_text("{}")
        checkpoints.commit(step, RunState(version=step, position={}, outstanding=[]))
    return run


@pytest.fixture
def run(tmp_path) -> Path:
    made = make_run(tmp_path / "runs" / "a")
    (tmp_path / "runs" / "link").symlink_to(made / "checkpoints" / "000050")
    (made / "checkpoints" / "kept").symlink_to("000050")
    return made


@pytest.mark.parametrize(
    ("working_directory", "named", "step"),
    [
        ("checkpoints", "000050", 50),
        ("checkpoints", "./000050/", 50),
        ("checkpoints/000050", ".", 50),
        ("checkpoints/000050", "../000050", 50),
        ("checkpoints/000050", "../../checkpoints/000050", 50),
        ("checkpoints/000050", "model", 50),
        ("checkpoints/000050/model", ".", 50),
        ("checkpoints", "kept", 50),
        (".", "checkpoints/000050", 50),
        (".", "checkpoints/kept", 50),
        (".", "checkpoints/000050/model", 50),
        (".", "checkpoint", 100),
        (".", ".", 100),
        ("checkpoints", "..", 100),
        ("..", "a", 100),
        ("..", "a/checkpoints/..", 100),
        ("..", "a/checkpoints/000050", 50),
        ("..", "a/checkpoint", 100),
        ("..", "link", 50),
    ],
)
def test_whatever_names_a_run_or_a_checkpoint_goes_on_with_that_run(
    working_directory, named, step, run, monkeypatch
):
    monkeypatch.chdir(run / working_directory)
    for path in (Path(named), Path.cwd() / named):
        config, checkpoint = to_resume(path, [])
        assert (Path(config.run.dir).resolve(), checkpoint.state.version) == (run, step)


@pytest.mark.parametrize("name", ["a", "20260101", "model"])
def test_a_run_may_lie_in_a_folder_of_checkpoints(name, tmp_path):
    run = make_run(tmp_path / "checkpoints" / name)
    config, checkpoint = to_resume(run, [])
    assert (config.run.dir, checkpoint.state.version) == (str(run), 100)


def test_a_run_that_cannot_be_seen_from_here_is_told_by_its_name_alone():
    run = Path("/shared/checkpoints/a")
    assert run_of(run) == run_of(run / "checkpoints" / "000100") == run


@pytest.mark.parametrize("named", ["checkpoints/000070", "checkpoints/50"])
def test_a_checkpoint_that_is_not_there_is_refused_by_its_name(named, run):
    with pytest.raises(
        CheckpointError, match=f"^checkpoint .*/runs/a/{named}: manifest.json is missing; "
    ):
        to_resume(run / named, [])


def test_what_belongs_to_no_run_is_refused_by_its_name(run, tmp_path):
    copied = shutil.copytree(run / "checkpoints" / "000100", tmp_path / "copied")
    for folder in (copied, run / "checkpoints", tmp_path):
        with pytest.raises(RunMissing, match=f"^{folder}: no config.json in it: "):
            to_resume(folder, [])


def test_lines_are_read_with_the_offsets_behind_them_and_a_torn_end_is_none(tmp_path):
    path, torn = tmp_path / "rows.jsonl", []
    path.write_bytes(b'{"step":1}\n{"step":2}\n{"step":3}')
    assert list(read_lines(path, decode_row)) == [(11, {"step": 1}), (22, {"step": 2})]
    assert len(list(read_lines(path, decode_row, torn=torn.append))) == 2 and torn == [3]
    with path.open("ab") as file:  # the writer completes it
        file.write(b"\n")
    assert list(read_lines(path, decode_row))[2:] == [(33, {"step": 3})]


@pytest.mark.parametrize("block", [1, 2, 7, 64, 2**16])
@pytest.mark.parametrize("end", ["", "\n", "torn", "\ntorn", "\n\n"])
def test_lines_are_read_back_from_the_last_with_the_offsets_behind_them(
    tmp_path, monkeypatch, block, end
):
    monkeypatch.setattr(run_dir, "BLOCK", block)
    path, draw = tmp_path / "rows.jsonl", random.Random(0)
    lines = [b"x" * draw.choice([0, 1, 5, 63, 64, 200]) for _ in range(20)]
    path.write_bytes(b"\n".join(lines) + end.encode())
    forwards = [(end, line.rstrip(b"\n")) for end, line in read_lines(path, bytes)]
    assert list(read_back(path)) == forwards[::-1]


def test_a_damaged_line_is_raised_or_named_and_the_others_are_read(tmp_path):
    path, damaged = tmp_path / "rows.jsonl", []
    path.write_bytes(b'{"step":1}\n{"st\n\xff\n[4]\n{"step":5}\n{')
    with pytest.raises(ValueError):
        list(read_lines(path, decode_row))
    rows = read_lines(path, decode_row, lambda number, error: damaged.append((number, error)))
    assert [row for _, row in rows] == [{"step": 1}, {"step": 5}]
    assert [number for number, _ in damaged] == [2, 3, 4]
    assert all(isinstance(error, ValueError) for _, error in damaged)


def test_a_number_of_a_row_may_be_none_that_json_has():
    row = decode_row(b'{"step": 1, "loss": NaN, "norm": Infinity}\n')
    assert row["step"] == 1 and row["loss"] != row["loss"] and row["norm"] == float("inf")
