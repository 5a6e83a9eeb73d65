import errno
import hashlib
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from async_opd.core.errors import CheckpointError
from async_opd.driver.checkpoints import Checkpoints, RunState, find
from tests.driver.checkpoint_process import BOOKS, go_back, save

PROCESS = [sys.executable, "-m", "tests.driver.checkpoint_process"]


def committed(run: Path) -> list[str]:
    return sorted(os.listdir(run / "checkpoints"))


def newest_of(run: Path) -> str:
    """Step and tag of the newest checkpoint, whose files are all of one save."""
    folder, state = find(run)
    name = f"{state.version} {state.counters['tag']}"
    assert (folder / "model" / "weights").read_text() == f"model/weights of {name}"
    assert (folder / "learner" / "deep" / "shard").read_text() == f"learner/deep/shard of {name}"
    return name


def test_a_checkpoint_is_found_with_all_that_was_written_and_the_link_leads_to_its_model(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=3)
    folder = checkpoints.begin(100)
    (folder / "model").mkdir()
    (folder / "model" / "weights").write_text("w")
    state = RunState(
        version=100,
        position={"epoch": 2, "row": 7},
        outstanding=["b@1", "a@0"],
        score=0.5,
        counters={"n": 1},
    )
    checkpoints.commit(100, state)
    assert (
        find(tmp_path)
        == find(tmp_path / "checkpoints" / "000100")
        == (tmp_path / "checkpoints" / "000100", state)
    )
    assert os.readlink(tmp_path / "checkpoint") == "checkpoints/000100/model"
    assert (tmp_path / "checkpoint" / "weights").read_text() == "w"
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint", "checkpoints"}
    manifest = msgspec.json.decode(
        (tmp_path / "checkpoints" / "000100" / "manifest.json").read_bytes()
    )
    w = "50e721e49c013f00c62cf59f2163542a9d8df02464efeb615d31051b0fddc326"  # printf w | sha256sum
    assert [file["name"] for file in manifest] == ["model/weights", "run.json"]
    assert manifest[0] == {"name": "model/weights", "size": 1, "sha256": w}


def test_everything_is_on_the_disk_before_it_gets_its_name_and_the_name_before_the_link(
    tmp_path, synced_and_renamed
):
    save(tmp_path, 1)
    done = synced_and_renamed()
    save(tmp_path, 2, keep=2)
    named = done.index("-> checkpoints/000002")
    inside = [
        "",
        "/model",
        "/model/weights",
        "/learner",
        "/learner/deep",
        "/learner/deep/shard",
        "/run.json",
    ]
    assert set(done[:named]) == {
        f"checkpoints/.000002.partial{name}" for name in [*inside, "/manifest.json"]
    }
    assert done[named + 1 :] == ["checkpoints", "-> checkpoint", "."]


def test_the_last_few_and_the_best_are_kept_and_the_link_follows(tmp_path):
    kept = []
    for step, score in [(1, None), (2, 0.7), (3, 0.9), (4, 0.9), (5, None), (6, 0.2), (7, 0.95)]:
        save(tmp_path, step, keep=2, score=score)
        assert (tmp_path / "checkpoint" / "weights").read_text() == f"model/weights of {step} new"
        kept.append([int(name) for name in committed(tmp_path)])
    # Of two equals the later is the better.
    assert kept == [[1], [1, 2], [2, 3], [3, 4], [4, 5], [4, 5, 6], [6, 7]]


def test_one_whose_score_cannot_be_read_any_more_is_not_the_best(tmp_path):
    save(tmp_path, 1, score=0.9)
    (tmp_path / "checkpoints" / "000001" / "run.json").write_text("{")
    save(tmp_path, 2)
    assert committed(tmp_path) == ["000002"]


def test_steps_beyond_six_digits_are_in_order(tmp_path):
    save(tmp_path, 999_999)
    save(tmp_path, 1_000_000)
    assert committed(tmp_path) == ["1000000"] and newest_of(tmp_path) == "1000000 new"


def test_a_step_is_saved_once(tmp_path):
    save(tmp_path, 1, keep=2)
    save(tmp_path, 2, "old", keep=2)
    with pytest.raises(CheckpointError, match=r"^checkpoint of step 2: it is saved already$"):
        save(tmp_path, 2, "new", keep=2)
    assert committed(tmp_path) == ["000001", "000002"] and newest_of(tmp_path) == "2 old"
    assert os.readlink(tmp_path / "checkpoint") == "checkpoints/000002/model"
    Checkpoints(tmp_path, keep=2).rewind(1)
    save(tmp_path, 2, "new", keep=2)
    assert committed(tmp_path) == ["000001", "000002"] and newest_of(tmp_path) == "2 new"


def test_what_lies_after_the_step_that_training_goes_on_from_is_set_aside(tmp_path):
    for number, tag in ((1, "first"), (2, "second")):
        for step in (1, 2, 3)[number - 1 :]:
            save(tmp_path, step, tag, keep=3)
        aside = Checkpoints(tmp_path, keep=3).rewind(1)
        assert aside == tmp_path / "set-aside" / f"{number}"
        assert committed(tmp_path) == ["000001"] and newest_of(tmp_path) == "1 first"
        assert (tmp_path / "checkpoint" / "weights").read_text() == "model/weights of 1 first"
        assert committed(aside) == ["000002", "000003"] and newest_of(aside) == f"3 {tag}"
        assert (aside / "checkpoint" / "weights").read_text() == f"model/weights of 3 {tag}"
    assert Checkpoints(tmp_path, keep=3).rewind(1) is None  # nothing lies there
    assert newest_of(tmp_path / "set-aside" / "1") == "3 first"


@pytest.mark.parametrize(
    ("lost", "named"),
    [
        ("run.json", "run.json"),
        ("model", "model/weights"),
        ("learner", "learner/rank-0"),
        ("learner/rank-1", "learner/rank-1"),
        ("teacher.safetensors", "teacher.safetensors"),
    ],
)
def test_a_manifest_that_does_not_list_all_of_a_checkpoint_is_refused(tmp_path, lost, named):
    checkpoints = Checkpoints(tmp_path, keep=1)
    folder = checkpoints.begin(1)
    for name in ("model/weights", "learner/rank-0", "learner/rank-1", "teacher.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    checkpoints.commit(1, RunState(version=1, position={}, outstanding=[]))
    manifest = tmp_path / "checkpoints" / "000001" / "manifest.json"
    files = msgspec.json.decode(manifest.read_bytes())
    kept = [file for file in files if not file["name"].startswith(lost)]
    manifest.write_bytes(msgspec.json.encode(kept))
    with pytest.raises(CheckpointError, match=f"manifest.json does not list {named}, which is"):
        find(tmp_path)
    # of an earlier version, which does not say what there is
    state = manifest.with_name("run.json")
    if lost in ("model", "learner"):
        state.write_text('{"version": 1, "position": {}, "outstanding": []}')
        (entry,) = (file for file in kept if file["name"] == "run.json")
        entry["size"] = state.stat().st_size
        entry["sha256"] = hashlib.sha256(state.read_bytes()).hexdigest()
        manifest.write_bytes(msgspec.json.encode(kept))
        with pytest.raises(CheckpointError, match=f"manifest.json does not list {lost}/, which"):
            find(tmp_path)


def test_begin_clears_what_a_crash_left(tmp_path):
    save(tmp_path, 1, keep=2)
    checkpoints = Checkpoints(tmp_path, keep=2)
    (checkpoints.begin(2) / "half").touch()
    (tmp_path / "checkpoints" / ".000007.partial").mkdir()
    assert list(checkpoints.begin(2).iterdir()) == []
    assert committed(tmp_path) == [".000002.partial", "000001"]


# What is there, what is done, and what counts afterwards: the earlier the kill, the further to the
# left.
KILLS = {
    "the first save": ([], "save_1", [None, "1 new"]),
    "a save that prunes": (["1 old"], "save_2", ["1 old", "2 new"]),
    "a save that removes several": (["1 old", "2 old"], "save_3", ["2 old", "3 new"]),
    "a rewind": (["1 old", "2 old", "3 old"], "rewind", ["3 old", "2 old", "1 old"]),
}


def template(folder: Path, before: list[str]) -> Path:
    """A run that was saved at those steps."""
    folder.mkdir()
    for step in before:
        save(folder, int(step.split()[0]), "old", keep=3)
    return folder


def killed(run: Path, what: str) -> list[Path]:
    """Copies of the run, one for each moment at which `what` can be killed, the earliest first."""
    out = run.with_name(f"{run.name} {what}")
    out.mkdir()
    subprocess.run([*PROCESS, "kill", run, out, what], check=True)
    return sorted(out.iterdir(), key=lambda copy: int(copy.name))


@pytest.mark.parametrize("name", KILLS)
def test_killed_before_any_change_of_the_disk_the_old_or_the_new_checkpoint_is_whole(
    tmp_path, name, monkeypatch
):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    before, what, after = KILLS[name]
    runs, seen = killed(template(tmp_path / "run", before), what), []
    assert len(runs) > 20
    for run in runs:
        try:
            seen.append(newest_of(run))
        except CheckpointError as e:
            seen.append(None)
            assert "no complete checkpoint" in str(e)
        if before:  # the link is never broken
            assert (run / "checkpoint" / "weights").read_text().removeprefix(
                "model/weights of "
            ) in after
        save(run, 9)
        assert committed(run) == ["000009"] and newest_of(run) == "9 new"
    assert set(seen) == set(after) and seen == sorted(seen, key=after.index)


def test_killed_again_while_clearing_up_after_a_kill_a_whole_checkpoint_is_left(tmp_path):
    states = {}
    for run in killed(template(tmp_path / "run", ["1", "2"]), "save_3"):
        states.setdefault((tuple(committed(run)), os.readlink(run / "checkpoint")), run)
    assert len(states) >= 7
    twice = [again for run in states.values() for again in killed(run, "recover")]
    assert len(twice) > 30
    for run in twice:
        newest = newest_of(run)
        assert newest in ("2 old", "3 new")
        assert (run / "checkpoint" / "weights").read_text().split()[2] in ("2", "3")
        Checkpoints(run, keep=1).recover()
        assert newest_of(run) == newest
        assert set(committed(run)) <= {"000001", "000002", "000003"}
        assert (run / "checkpoint" / "weights").read_text() == f"model/weights of {newest_of(run)}"


def test_killed_at_any_moment_of_going_back_nothing_is_lost_and_it_can_be_tried_again(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    run = template(tmp_path / "run", ["1 old", "2 old", "3 old"])
    for name, content in BOOKS.items():
        (run / name).write_bytes(content)
    runs = killed(run, "go_back")
    assert len(runs) > 30
    for run in runs:
        go_back(run)  # again
        assert committed(run) == ["000001"] and newest_of(run) == "1 old"
        asides = list((run / "set-aside").iterdir())
        assert asides and all(aside.name.isdecimal() for aside in asides)
        kept = [newest_of(folder) for folder in run.glob("set-aside/*/checkpoints/*")]
        assert sorted(kept) == ["2 old", "3 old"]
        for name, content in BOOKS.items():
            copies = [aside / name for aside in asides if (aside / name).exists()]
            assert content in [copy.read_bytes() for copy in copies]
            left = (run / name).read_bytes() if (run / name).exists() else b""
            assert left == (b"" if name == "summary.json" else b'{"step": 1}\n')
        save(run, 9)
        assert committed(run) == ["000009"] and list((run / "set-aside").iterdir()) == asides


DAMAGES = {
    "flipped bit": (
        lambda file: flip(file, 0, 1),
        "is damaged: its sha256 is not that of the manifest",
    ),
    "lost end": (lambda file: os.truncate(file, 5), "has 5 bytes instead of "),
    "missing file": (lambda file: file.unlink(), "is missing"),
}


def flip(file: Path, place: int, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= bit
    file.write_bytes(content)


@pytest.fixture
def run(tmp_path) -> Path:
    """Two checkpoints, of steps 50 and 100."""
    save(tmp_path / "my run", 50, keep=2)
    save(tmp_path / "my run", 100, keep=2)
    return tmp_path / "my run"


@pytest.mark.parametrize("file", ["model/weights", "learner/deep/shard", "run.json"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named_and_the_words_for_the_one_before_are_given(run, file, damage):
    do, what = DAMAGES[damage]
    folder = run / "checkpoints" / "000100"
    do(folder / file)
    for asked in (run, folder):
        with pytest.raises(CheckpointError) as raised:
            find(asked)
        message = str(raised.value)
        assert message.startswith(f"checkpoint {folder}: {file} {what}")
        assert message.endswith(f"async-opd train --resume '{run}/checkpoints/000050'")
    assert newest_of(run / "checkpoints" / "000050") == "50 new"


def test_any_flipped_bit_of_the_manifest_is_refused(run):
    manifest = run / "checkpoints" / "000100" / "manifest.json"
    whole = manifest.read_bytes()
    for place in range(len(whole)):
        flip(manifest, place, 1 << place % 8)
        with pytest.raises(CheckpointError, match="000100"):
            find(run)
        manifest.write_bytes(whole)
    assert newest_of(run) == "100 new"


def test_a_manifest_that_names_one_file_twice_and_another_never_is_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    folder = checkpoints.begin(1)
    for shard in ("shard-0", "shard-1"):  # one bit apart
        (folder / shard).write_text(shard)
    checkpoints.commit(1, RunState(version=1, position={}, outstanding=[]))
    manifest = tmp_path / "checkpoints" / "000001" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b"shard-0", b"shard-1"))
    with pytest.raises(CheckpointError, match="000001: shard-1 is damaged"):
        find(tmp_path)


def test_without_its_manifest_it_is_refused(run):
    (run / "checkpoints" / "000100" / "manifest.json").unlink()
    for asked in (run, run / "checkpoints" / "000100"):
        with pytest.raises(CheckpointError, match=r"000100: manifest.json is missing; .*/000050'$"):
            find(asked)


def test_one_that_was_never_finished_is_refused_even_if_every_file_is_there(run):
    partial = run / "checkpoints" / ".000100.partial"
    (run / "checkpoints" / "000100").rename(partial)
    with pytest.raises(
        CheckpointError, match=r"000100.partial: its writing was never finished; .*/000050'$"
    ):
        find(partial)
    assert newest_of(run) == "50 new"


def test_what_an_earlier_version_left_of_a_replaced_one_is_refused(run):
    old = run / "checkpoints" / ".000100.old"
    (run / "checkpoints" / "000100").rename(old)
    with pytest.raises(CheckpointError, match=r"000100.old: .*/000050'$"):
        find(old)
    assert newest_of(run) == "50 new"


def test_the_one_that_is_offered_is_intact_itself(run):
    save(run, 150, keep=3)
    for step in ("000100", "000150"):
        (run / "checkpoints" / step / "model" / "weights").unlink()
    with pytest.raises(CheckpointError, match=r"000150: model/weights is missing; .*/000050'$"):
        find(run)
    (run / "checkpoints" / "000050" / "model" / "weights").unlink()
    with pytest.raises(CheckpointError, match=r"000150: .*; no intact one lies before it$"):
        find(run)


def test_a_run_that_has_saved_nothing_says_so(tmp_path):
    with pytest.raises(CheckpointError, match=r"no complete checkpoint in .*checkpoints$"):
        find(tmp_path)


def test_a_copy_of_one_that_lies_elsewhere_is_found(run, tmp_path):
    shutil.copytree(run / "checkpoints" / "000100", tmp_path / "best")
    assert newest_of(tmp_path / "best") == "100 new"


def test_a_full_disk_is_named_and_the_earlier_checkpoint_stays(tmp_path):
    save(tmp_path / "template", 1, "old")
    run, disk = tmp_path / "disk" / "run", tmp_path / "disk"
    disk.mkdir()
    mounted = f'mount -t tmpfs -o size=128k none "{disk}" && cp -a "{tmp_path}/template" "{run}" &&'
    in_a_namespace = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if subprocess.run([*in_a_namespace, f"{mounted} true"], capture_output=True).returncode:
        pytest.skip("no mounts of one's own here")
    job = subprocess.run(
        [*in_a_namespace, f'{mounted} "$@"', "sh", *PROCESS, "fill", run],
        capture_output=True,
        text=True,
    )
    assert job.returncode == 0, job.stderr
    named = f"{run}/checkpoints/.000002.partial/run.json"
    assert job.stdout == f"checkpoint of step 2: {named}: No space left on device\n"


def test_a_file_that_may_not_grow_is_named_and_the_earlier_checkpoint_stays(tmp_path):
    save(tmp_path, 1, "old")
    checkpoints = Checkpoints(tmp_path, keep=1)
    (checkpoints.begin(2) / "shard").write_text("x")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(
            CheckpointError, match=r"step 2: .*/\.000002\.partial/run\.json: File too large"
        ):
            checkpoints.commit(2, RunState(version=2, position={}, outstanding=["prompt"] * 2000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert committed(tmp_path) == ["000001"] and newest_of(tmp_path) == "1 old"


@pytest.mark.parametrize(("call", "least"), [("fsync", 10), ("rename", 2), ("symlink", 1)])
def test_a_disk_that_is_full_at_any_later_moment_leaves_a_whole_checkpoint(
    tmp_path, monkeypatch, call, least
):
    """Each call in turn is the first that finds no room, and all after it find none either."""
    real, left = getattr(os, call), 0

    def full(*args, **kwargs):
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *args[:1])
        return real(*args, **kwargs)

    save(tmp_path, 1, "old")
    failures = 0
    for room in range(100):
        Checkpoints(tmp_path, keep=2).rewind(1)
        left = room
        monkeypatch.setattr(os, call, full)
        try:
            save(tmp_path, 2, "new", keep=2)
            error = None
        except CheckpointError as e:
            error = str(e)
        finally:
            monkeypatch.undo()
        assert newest_of(tmp_path) in (["2 new"] if error is None else ["1 old", "2 new"])
        assert (tmp_path / "checkpoint" / "weights").exists()
        if error is None:
            break
        failures += 1
        assert error.startswith("checkpoint of step 2: ") and error.endswith(
            "No space left on device"
        )
    assert failures >= least
