import subprocess
import sys

import pytest

from async_opd.core.errors import DataError
from async_opd.roles.verifier.answers.response import last_boxed
from async_opd.roles.verifier.checks import load
from async_opd.roles.verifier.checks.math import check
from async_opd.roles.verifier.config import VerifyConfig


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"So it is \boxed{42}.", "42"),
        (r"\boxed{\frac{2}{4}}", r"\frac{1}{2}"),
        (r"\boxed{0.5}", "1/2"),
        (r"\boxed{1,000}", "1000"),
        (r"\boxed{x \cdot x}", "$x^2$"),
        (r"\boxed{(x+1)^2}", "x^2+2x+1"),
        (r"\boxed{\{2,1\}}", r"\{1,2\}"),
        (r"\boxed {\text{no solution}}", r"\text{no solution}"),
        (r"\boxed{7}", r"Seven days make a week: \boxed{7}"),
        (r"first \boxed{1}, no: \boxed{2}", "2"),
        (r"\boxed{\boxed{2}}", "2"),
        ("The answer is 42.", "42"),
        (r"The answer is $\frac{1}{2}$.", "0.5"),
        (r"\boxed{][}", "]["),
    ],
)
def test_equal_answers_are_right(response, answer):
    right, read = check(response, answer)
    assert right is True and check(read, answer) == (True, read)


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"\boxed{41}", "42"),
        (r"first \boxed{2}, no: \boxed{1}", "2"),
        (r"2 \boxed{}", "2"),
        (r"2 \boxed{2", "2"),
        (r"\boxed{\frac{}{}}}{", "2"),
        (r"\boxed{" + "(" * 20 + "}", "2"),
        ("", "2"),
        ("no idea", "2"),
    ],
)
def test_other_and_unparseable_answers_are_wrong(response, answer):
    right, read = check(response, answer)
    assert right is False and check(read, answer) == (False, read)


@pytest.mark.parametrize(
    ("response", "read"),
    [
        (r"first \boxed{2}, no: \boxed{ 0.5 }", r"\boxed{0.5}"),
        ("The answer is 41.", r"\boxed{41}"),
        (r"2 \boxed{2", ""),
        (r"\boxed{}", ""),
        ("no idea", ""),
    ],
)
def test_the_answer_that_was_read_is_told(response, read):
    assert check(response, "7") == (False, read)


@pytest.mark.parametrize("answer", ["", "  ", r"\boxed{", "$$"])
def test_a_reference_that_does_not_parse_is_an_error_and_not_a_wrong_response(answer):
    with pytest.raises(DataError, match="reference answer"):
        check(r"\boxed{2}", answer)


def test_the_last_box_ends_at_its_own_brace():
    assert last_boxed(r"\boxed{1} \boxed{ \frac{1}{2} } {3}") == r"\frac{1}{2}"
    assert last_boxed(r"\boxed{\left\{ x \right.}}") == r"\left\{ x \right."
    assert last_boxed(r"\fbox{2}") == "2"
    assert last_boxed(r"\boxed{2") == ""
    assert last_boxed("2") is None


def test_kinds_are_listed_without_importing_them():
    code = (
        "import sys; from async_opd.roles.verifier.checks import kinds; print(kinds(),"
        " 'math_verify' in sys.modules)"
    )
    assert (
        subprocess.check_output([sys.executable, "-c", code], text=True)
        == "('choice', 'code', 'exact', 'math', 'math_verify', 'numeric') False\n"
    )
    assert load(VerifyConfig(check="math")) is check
