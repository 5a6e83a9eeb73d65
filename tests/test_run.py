from async_opd import run as runs


def test_an_earlier_run_directory_is_kept_beside_the_new_one(tmp_path):
    for _ in range(3):
        runs.make_dir(tmp_path / "run").joinpath("mine").touch()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "run.1", "run.2"]
    assert all((p / "mine").exists() for p in tmp_path.iterdir())
