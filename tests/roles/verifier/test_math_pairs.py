"""The table of verdicts, old problems of the demo, and what answers may cost."""

import time

import pytest

from async_opd.core.errors import DataError
from async_opd.roles.verifier.checks import load
from async_opd.roles.verifier.checks.math import check
from async_opd.roles.verifier.config import VerifyConfig
from async_opd.toy import task
from tests.roles.verifier.math_pairs import LIMITS, PAIRS, RESPONSES


def verdicts(pairs) -> list[tuple[str, str, bool, str]]:
    """The pairs with what the check says of them, in a box."""
    return [
        (answer, reference, check(f"So it is \\boxed{{{answer}}}.", reference)[0], why)
        for answer, reference, _, why in pairs
    ]


@pytest.mark.parametrize("rule", PAIRS)
def test_each_pair_is_judged_as_the_table_says(rule):
    assert verdicts(PAIRS[rule]) == PAIRS[rule]


def test_what_is_judged_otherwise_than_a_reader_would_stays_as_listed():
    assert verdicts(LIMITS) == LIMITS


@pytest.mark.parametrize(("response", "reference", "right", "why"), RESPONSES)
def test_the_answer_is_read_where_it_stands(response, reference, right, why):
    verdict, read = check(response, reference)
    assert (verdict, why) == (right, why)
    assert check(read, reference) == (verdict, read)


def test_the_table_is_large_and_says_each_pair_once():
    pairs = [(answer, reference) for rows in PAIRS.values() for answer, reference, _, _ in rows] + [
        (answer, reference) for answer, reference, _, _ in RESPONSES
    ]
    assert len(pairs) >= 300
    rights = [right for rows in PAIRS.values() for _, _, right, _ in rows]
    assert min(rights.count(True), rights.count(False)) >= 150
    assert all(why for rows in (*PAIRS.values(), RESPONSES, LIMITS) for *_, why in rows)


def test_a_problem_of_the_demo_copied_is_wrong_and_its_sum_is_right():
    problems = task.dataset(heldout=True)[:256]
    assert len(problems) == 256
    for problem in problems:
        copied = task.prompt(problem)
        for text in (copied, copied.rstrip("=")):
            assert check(f"\\boxed{{{text}}}", task.answer(problem))[0] is False
        assert check(task.response(problem), task.answer(problem))[0] is True


@pytest.mark.parametrize(
    "answer",
    [
        "9^" * 300 + "9",
        "(" * 900 + "9" + ")" * 900,
        r"\sqrt{" * 300 + "9" + "}" * 300,
        r"\frac{1}{" * 300 + "9" + "}" * 300,
        "-" * 1900 + "9",
        "+".join(["1"] * 900),
        "+".join(rf"\sqrt{{{n}}}" for n in range(2, 200)),
        r"\cdot".join(rf"\sqrt{{{n}}}" for n in range(2, 150)),
        "9" * 100_000,
        "1e99999999",
        "99999999999999!",
        "9!" + "!" * 500,
        r"\binom{10^{30}}{10^{20}}",
        r"\sin(10^{1000000})",
        "(10^{30000})^{10^{30000}}",
        "9^{-9^{9^{9^9}}}",
        ",".join(map(str, range(3000))),
        r"\pm" * 300 + "1",
        r"\text{" * 500 + "}" * 500,
        r"\begin{pmatrix}" + "&".join("1" * 500) + r"\end{pmatrix}",
        "x=" * 900 + "3",
        "a" * 1900 + " cm",
        "\\" * 1999,
        "{" * 1000,
        r"\frac" * 300,
        r"\log_" * 300,
        "√" * 1500,
        "5" + "%" * 1500 + "5",
        "5" + "cm/" * 600 + "5",
        "5" + "1/" * 900 + "5",
    ],
    ids=lambda answer: answer[:12],
)
@pytest.mark.parametrize("reference", ["2", "x+1", r"\{1,2\}"])
def test_an_answer_that_is_costly_is_wrong_and_soon(answer, reference, monkeypatch):
    monkeypatch.setattr("async_opd.roles.verifier.checks.math.verify", lambda *_, **__: False)
    monkeypatch.setattr("async_opd.roles.verifier.checks.math.parsed", lambda text: [])
    begun = time.process_time()
    assert check(f"\\boxed{{{answer}}}", reference)[0] is False
    assert time.process_time() - begun < 1.0


@pytest.mark.parametrize("kind", ["math", "numeric", "choice", "exact"])
@pytest.mark.parametrize(
    "response",
    [
        r"\boxed{1}" + r"\text{ and }" * 50_000 + r"x\boxed{2}",
        r"\boxed{1}\text {" + " " * 500_000 + r"\boxed{2}",
        "the answer is " * 40_000,
        "the answer is" + " " * 500_000,
        "<think>" * 100_000,
    ],
    ids=lambda response: response[:12],
)
def test_a_long_response_is_judged_soon(response, kind):
    check = load(VerifyConfig(check=kind))
    begun = time.process_time()
    assert check(response, "B" if kind == "choice" else "7")[0] is False
    assert time.process_time() - begun < 1.0


@pytest.mark.parametrize("answer", ["", "  ", "$$", r"\boxed{", r"\frac{1}{2", "}{", r"\boxed{}"])
def test_a_reference_that_no_response_could_match_is_an_error(answer):
    with pytest.raises(DataError, match=r"reference answer .* does not parse"):
        check(r"\boxed{2}", answer)
