"""Files and folders are there whole or not at all."""

import os
import resource

import pytest

from async_opd.core import files


def test_a_file_is_replaced_whole_or_stays_as_it_was(tmp_path):
    path = tmp_path / "config.json"
    files.write_file(path, b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match="File too large") as raised:
            files.write_file(path, b"x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert raised.value.filename == str(tmp_path / ".config.json.partial")
    assert path.read_bytes() == b"old"
    files.write_file(path, b"new")  # what the first left behind is no hindrance
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["config.json"]


def test_a_folder_is_there_once_all_of_it_is_on_the_disk(tmp_path, synced_and_renamed):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "of a kill").touch()
    partial = files.begin_folder(tmp_path / "out")
    (partial / "deep").mkdir()
    (partial / "deep" / "shard").write_text("s")
    assert not (tmp_path / "out").exists()
    done = synced_and_renamed()
    files.commit_folder(tmp_path / "out")
    assert set(done[:-2]) == {f".out.partial{name}" for name in ("", "/deep", "/deep/shard")}
    assert done[-2:] == ["-> out", "."]
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == ["deep"]


def test_a_folder_takes_the_place_of_another_only_where_it_is_to(tmp_path):
    for name in ("first", "second"):
        (files.begin_folder(tmp_path / "out") / name).touch()
        if name == "first":
            files.commit_folder(tmp_path / "out")
    with pytest.raises(OSError, match="not empty"):
        files.commit_folder(tmp_path / "out")
    assert os.listdir(tmp_path / "out") == ["first"]
    files.commit_folder(tmp_path / "out", replace=True)
    assert os.listdir(tmp_path / "out") == ["second"]
    files.remove_folder(tmp_path / "out")
    assert os.listdir(tmp_path) == []
