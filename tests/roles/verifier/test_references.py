"""References that a check cannot use, asked before anything is sampled."""

import sys
import threading
import time

import pytest

from async_opd.core.errors import ConfigError
from async_opd.roles.verifier.config import VerifyConfig
from async_opd.roles.verifier.references import References

OWN = """
import os, time

def right(response, answer):
    return response == answer

def _reference(answer):
    if answer == "hangs":
        time.sleep(60)
    if answer == "dies":
        os._exit(3)
    if answer == "raises":
        raise KeyError("no such key")

right.read_reference = _reference

def plain(response, answer):
    return True
"""


def unusable(answers, **settings) -> dict[str, str]:
    return References(VerifyConfig(**settings)).unusable(answers, threading.Event())


@pytest.mark.parametrize(
    ("check", "bad", "good"),
    [
        ("math", ["", " ", r"\boxed{}"], ["2", "-1.5", r"\frac{1}{2}", r"\boxed{x+1}", "1/2"]),
        (
            "code",
            [
                "",
                "null",
                "2",
                "{}",
                '{"test_list": ["assert 1="]}',
                '{"inputs": [1], "outputs": []}',
            ],
            ['{"inputs": ["1"], "outputs": ["2"]}', '{"test_list": ["assert f() == 1"]}'],
        ),
    ],
)
def test_a_check_says_which_references_it_cannot_use(check, bad, good):
    assert set(unusable([*bad, *good, *bad], check=check)) == set(bad)


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_check.py").write_text(OWN)
    monkeypatch.setenv("PYTHONPATH", ":".join([str(tmp_path), *sys.path]))
    return "own_check"


def test_a_reference_that_hangs_kills_or_raises_costs_itself_alone(own):
    answers = [f"{n}" for n in range(40)]
    answers[3:3] = ["hangs", "dies", "raises"]
    wrong = unusable(answers, check=f"{own}:right", timeout_s=1.0)
    assert wrong == {
        "hangs": "the check takes more than 1 s at this reference",
        "dies": "the check's process dies at this reference",
        "raises": "the check: KeyError: 'no such key'",
    }


def test_a_check_without_a_word_on_references_takes_them_as_they_are(own):
    assert unusable(["", "x"], check=f"{own}:plain") == {}


@pytest.mark.parametrize(
    ("check", "why"),
    [
        ("nowhere:plain", "cannot be imported: ModuleNotFoundError: No module named 'nowhere'"),
        ("own_check:none_such", "cannot be imported: AttributeError: module 'own_check' has no"),
        ("own_check:OWN", "is a str, and must be a function"),
        ("broken:right", "cannot be imported: ZeroDivisionError: division by zero"),
        ("killed:right", "the check's process dies while it is loaded"),
    ],
)
def test_a_check_that_cannot_be_loaded_is_refused_before_anything_starts(own, tmp_path, check, why):
    (tmp_path / "own_check.py").write_text("OWN = ''\n")
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "killed.py").write_text("import os\nos._exit(3)\n")
    with pytest.raises(ConfigError, match=f"^verify.check = '{check}': {why}") as raised:
        unusable([f"{n}" for n in range(100)], check=check)
    assert "\n" not in str(raised.value)


def test_verdicts_are_kept_by_the_source_of_all_that_reads_references(own, monkeypatch, tmp_path):
    key = References(VerifyConfig(check="math")).key
    assert "def read_wanted(" in key  # of a file that the check imports
    monkeypatch.syspath_prepend(tmp_path)
    assert OWN in References(VerifyConfig(check=f"{own}:right")).key


def test_a_stop_does_not_wait_for_a_reference(own):
    stop, begun = threading.Event(), time.monotonic()
    threading.Timer(1.0, stop.set).start()
    config = VerifyConfig(check=f"{own}:right", timeout_s=50.0)
    References(config).unusable(["hangs"], stop)
    assert time.monotonic() - begun < 20


def test_what_they_are_judged_by_is_the_source_of_the_whole_check(own, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    assert "def right(response, answer)" in References(VerifyConfig(check=f"{own}:right")).key
    assert "def read_expression" in References(VerifyConfig(check="math")).key
