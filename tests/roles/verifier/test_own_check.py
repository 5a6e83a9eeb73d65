"""A function of the user's as the check."""

import os

import pytest

from async_opd.core.errors import ConfigError


async def test_a_function_of_the_users_decides(start_pool, check, own_check):
    own_check("def ends(response, answer):\n    return response.endswith(answer)")
    pool = await start_pool(check="mine:ends")
    verdicts = [await pool.check(check(response, "yes")) for response in ("well, yes", "no")]
    assert [verdict.correct for verdict in verdicts] == [True, False]


async def test_an_answer_other_than_true_or_false_is_unknown(start_pool, check, own_check):
    own_check("def score(response, answer):\n    return 0.5")
    verdict = await (await start_pool(check="mine:score")).check(check())
    assert (verdict.correct, verdict.cause) == (None, "check raised TypeError")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        (
            "nowhere:f",
            (
                r"verify\.check = 'nowhere:f': cannot be imported: ModuleNotFoundError: No module"
                r" named 'nowh"
            ),
        ),
        (
            "mine:absent",
            r"verify\.check = 'mine:absent': cannot be imported: AttributeError: .*'absent'",
        ),
        ("mine:LIMIT", r"verify\.check = 'mine:LIMIT': is a int, and must be a function"),
    ],
)
async def test_one_that_cannot_be_used_is_refused_at_start(start_pool, own_check, name, why):
    own_check("LIMIT = 3")
    with pytest.raises(ConfigError, match=why):
        await start_pool(check=name)


async def test_a_check_has_of_the_environment_what_it_needs_and_what_is_named(
    start_pool, check, own_check, monkeypatch
):
    own_check("""
import os
def seen(response, answer):
    return sorted({*os.environ} - {"LC_CTYPE"}) == response.split()
""")
    for name in ("WANDB_API_KEY", "HF_TOKEN", "NAMED", "LD_PRELOAD_"):
        monkeypatch.setenv(name, "hunter2")
    monkeypatch.setenv("TMPDIR", "/tmp")
    passed = {"PATH", "HOME", "LANG", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONPATH"} & {*os.environ}
    for env in ((), ("NAMED", "NEVER_SET")):
        pool = await start_pool(check="mine:seen", env=env)
        names = sorted({"OPENBLAS_NUM_THREADS", *passed, *env} - {"NEVER_SET"})
        assert (await pool.check(check(" ".join(names)))).correct is True


async def test_a_check_lies_where_the_job_works(start_pool, check, monkeypatch, tmp_path):
    (tmp_path / "beside.py").write_text("def right(response, answer):\n    return True")
    monkeypatch.chdir(tmp_path)
    assert (await (await start_pool(check="beside:right")).check(check())).correct is True
