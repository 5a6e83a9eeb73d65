"""The checks `choice`, `exact`, `numeric` and `math_verify`, and which references they can use."""

import pytest

from async_opd.core.errors import DataError
from async_opd.roles.verifier.checks import choice, exact, kinds, load, math_verify, reference
from async_opd.roles.verifier.config import VerifyConfig


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        (r"\boxed{B}", "B", True),
        (r"\boxed{\textbf{(B)}\ 5}", "B", True),
        (r"\boxed{\text{(B)}}", "(B)", True),
        (r"\boxed{(b)}", "B", True),
        (r"\boxed{b}", "B", True),
        (r"\boxed{B.}", "B", True),
        (r"\boxed{B. Vitamin C}", "B", True),
        (r"\boxed{\textbf{B}}", r"\textbf{(B)}", True),
        (r"\boxed{\mathrm{(B)}\ \frac{1}{2}}", "B", True),
        (r"\boxed{B: 7}", "B", True),
        ("B", "B", True),
        ("(b)", "B", True),
        ("The answer is B.", "B", True),
        ("The correct answer is (B), because A is too small.", "B", True),
        ("The answer is **B**.", "B", True),
        ("**Answer: B**", "B", True),
        ("A is too small.\n\nB", "B", True),
        ("Answer: option B", "B", True),
        (r"A? No: \boxed{A}. Rather \boxed{B}", "B", True),
        (r"<think>A</think>The answer is B", "B", True),
        (r"\boxed{A}", "B", False),
        (r"\boxed{A, B}", "B", False),
        (r"\boxed{A or B}", "B", False),
        (r"\boxed{(A) or (B)}", "A", False),
        (r"\boxed{(A)(B)}", "A", False),
        (r"\boxed{A} or \boxed{B}", "B", False),
        (r"\boxed{A}, \boxed{B}", "B", False),
        ("The answer is A or B.", "A", False),
        ("The answer is a dog.", "A", False),
        (r"<think>The answer is \boxed{B}</think>", "B", False),
        ("Because of it.", "B", False),
        (r"\boxed{5}", "B", False),
        (r"\boxed{}", "B", False),
        ("", "B", False),
    ],
)
def test_a_choice_is_one_letter(response, answer, right):
    verdict, read = choice.check(response, answer)
    assert verdict is right
    assert choice.check(read, answer) == (verdict, read)


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        (r"\boxed{blue}", "blue", True),
        ("  blue\n", "blue", True),
        ("dark\n  blue", "dark blue", True),
        (r"It is \boxed{blue}.", r"\boxed{blue}", True),
        ("<think>red?</think>\nblue", "blue", True),
        ("Blue", "blue", False),
        ("blue.", "blue", False),
        ("It is blue", "blue", False),
        (r"\boxed{0.5}", "1/2", False),
        (r"<think>\boxed{blue}</think>", "blue", False),
        (r"<think>blue", "blue", False),
        ("", "blue", False),
    ],
)
def test_an_exact_match_is_letter_by_letter(response, answer, right):
    verdict, read = exact.check(response, answer)
    assert verdict is right
    assert exact.check(read, answer) == (verdict, read)


@pytest.mark.parametrize(
    ("response", "answer", "tolerance", "right"),
    [
        (r"\boxed{3.14}", "3.14159", 0.01, True),
        (r"\boxed{3.14}", "3.14159", None, False),
        (r"\boxed{101}", "100", 0.01, True),
        (r"\boxed{102}", "100", 0.01, False),
        (r"\boxed{-99.5}", "-100", 0.01, True),
        (r"\boxed{99.5}", "-100", 0.01, False),
        (r"\boxed{9.1e-31}", "1.6e-19", 0.01, False),
        (r"\boxed{1.61e-19}", "1.6e-19", 0.01, True),
        (r"\boxed{0}", "0", 0.01, True),
        ("It is −5", "-5", None, True),
        ("It is −5", "5", None, False),
        ("It is 1/2", "0.5", None, True),
        ("It is 1/2", "2", None, False),
        ("The answer is 5 or 6.", "6", None, False),
        ("The answer is 5 since 6 is too large, not 7. So 8.", "8", None, False),
        (r"\boxed{0.001}", "0", 0.01, False),
        (r"\boxed{100}", "100", 0.0, True),
        (r"\boxed{100.0001}", "100", 0.0, False),
        (r"\boxed{\frac{1}{3}}", "0.333", 0.01, True),
        (r"\boxed{\sqrt{2}}", "1.414", 0.01, True),
        (r"\boxed{x = 5\text{ cm}}", "5", 0.01, True),
        (r"\boxed{5\text{ cm}}", r"5\text{ m}", 0.01, False),
        (r"\boxed{50\%}", "0.5", 0.01, True),
        ("The answer is 101 apples.", "100", 0.01, True),
        ("20 and 81 make 101", "100", 0.01, True),
        ("so 20\n#### 1,010", "20 of 50 are\n#### 1000", 0.01, True),
        (r"\boxed{136+99}", "235", 0.01, False),
        (r"\boxed{100, 300}", "100", 0.01, False),
        (r"\boxed{100} or \boxed{300}", "300", 0.01, False),
        (r"\boxed{1/0}", "100", 0.01, False),
        (r"\boxed{x}", "100", 0.01, False),
        (r"<think>\boxed{100}</think>", "100", 0.01, False),
        ("no idea", "100", 0.01, False),
    ],
)
def test_a_number_is_within_the_tolerance(response, answer, tolerance, right):
    check = load(VerifyConfig(check="numeric", tolerance=tolerance))
    verdict, read = check(response, answer)
    assert verdict is right
    assert check(read, answer) == (verdict, read)


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        (r"\boxed{\frac{2}{4}}", "0.5", True),
        (r"\boxed{136+99}", "235", True),  # as it stands in papers
        (r"<think>\boxed{5}</think>", "5", True),
        (r"\boxed{5}", "6", False),
    ],
)
def test_math_verify_is_the_plain_library(response, answer, right):
    assert math_verify.check(response, answer)[0] is right


@pytest.mark.parametrize(
    ("check", "usable", "unusable"),
    [
        ("math", r"\frac{1}{2}", r"\frac{1}{2"),
        ("math_verify", r"\frac{1}{2}", " "),
        ("numeric", "1e3", "many"),
        ("numeric", "x = 5", "1/0"),
        ("choice", "(B)", "F"),
        ("choice", r"\textbf{(B)}\ 5", "5"),
        ("exact", "blue", " "),
        ("code", '{"inputs": ["1"], "outputs": ["2"]}', "{}"),
    ],
)
def test_a_reference_is_read_without_a_response(check, usable, unusable):
    read_reference = reference(VerifyConfig(check=check))
    read_reference(usable)
    with pytest.raises(DataError, match="reference answer"):
        read_reference(unusable)


def test_every_check_has_its_name():
    assert set(kinds()) == {"choice", "code", "exact", "math", "math_verify", "numeric"}
