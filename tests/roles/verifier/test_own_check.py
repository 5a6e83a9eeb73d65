"""A function of the user's as the check."""

import os

import pytest

from async_opd.core.errors import ConfigError


async def test_a_function_of_the_users_decides(start_pool, check, own_check):
    own_check("def ends(response, answer):\n    return response.endswith(answer)")
    pool = await start_pool(check="mine:ends")
    verdicts = [await pool.check(check(response, "yes")) for response in ("well, yes", "no")]
    assert [verdict.correct for verdict in verdicts] == [True, False]


REWARDS = {  # what a check returns, and the reward that it is
    "True": 1.0,
    "False": 0.0,
    "1": 1.0,
    "0": 0.0,
    "0.25": 0.25,
    "1e-300": 1e-300,
    "np.True_": 1.0,
    "np.float32(0.25)": 0.25,
    "np.float64(0.3)": 0.3,
    "np.int64(1)": 1.0,
    "np.float16(0.5)": 0.5,
    "np.longdouble(0.5)": 0.5,
    "np.array(0.5)": 0.5,
    "-0.0": 0.0,
    "Fraction(3, 4)": 0.75,
    "Decimal('0.3')": 0.3,
    "torch.tensor(0.5)": 0.5,
    "torch.tensor(True)": 1.0,
    "(torch.tensor([1, 0]) == 1).float().mean()": 0.5,
}
IMPORTS = "import numpy as np\nfrom decimal import Decimal\nfrom fractions import Fraction\n"


async def test_a_number_from_0_to_1_is_the_reward(start_pool, check, own_check):
    own_check(f"import torch\n{IMPORTS}def score(response, answer):\n    return eval(response)")
    pool = await start_pool(check="mine:score", memory_gib=8)
    verdicts = [await pool.check(check(text)) for text in REWARDS]
    assert [verdict.reward for verdict in verdicts] == [*REWARDS.values()]
    assert {type(verdict.reward) for verdict in verdicts} == {float}
    # right is what has all of it
    assert [verdict.correct for verdict in verdicts] == [reward == 1 for reward in REWARDS.values()]


FAULTY = {  # what a check returns, and how it is shown where that is otherwise
    "1.0000001": "",
    "-0.5": "",
    "2": "",
    "float('nan')": "nan",
    "float('inf')": "inf",
    "np.float32('nan')": "nan",
    "np.int64(7)": "7",
    "None": "",
    "'0.5'": "",
    "[0.5]": "",
    "(0.5, '')": "",
    "np.array([0.5])": "array([0.5])",
    "0.5j": "",
    "Fraction(3, 2)": "Fraction(3, 2)",
    "np.array(1.5)": "1.5",
}


async def test_what_is_no_number_from_0_to_1_is_unknown_by_name(start_pool, check, own_check):
    own_check(f"{IMPORTS}def score(response, answer):\n    return eval(response)")
    pool = await start_pool(check="mine:score")
    must = "and must return True, False or a number from 0 to 1"
    for text, shown in FAULTY.items():
        verdict = await pool.check(check(text))
        cause = f"check raised DataError: mine:score returned {shown or text}, {must}"
        assert (verdict.reward, verdict.correct, verdict.cause) == (None, None, cause)
    verdict = await pool.check(check("10**5000"))  # more digits than Python writes
    assert verdict.reward is None and must in verdict.cause


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
