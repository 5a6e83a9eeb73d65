"""Whether two expressions have the same value, and the answer's is worked out."""

import random
from fractions import Fraction

from async_opd.roles.verifier.answers.finished import CALCULATION, left_over
from async_opd.roles.verifier.answers.shapes import Scalar, infinite
from async_opd.roles.verifier.answers.terms import (
    DIGITS,
    PRECISE,
    Call,
    Negative,
    Number,
    Power,
    Product,
    Quotient,
    Term,
    Unreadable,
    Value,
    evaluate,
    holds,
    names,
    parts,
    precise,
)
from async_opd.roles.verifier.answers.units import PERCENT

HUNDREDTH = Fraction(1, 100)
RELATIVE = 1e-40
APPROXIMATE = 1e-12  # where one is a decimal with as many digits
SIGNIFICANT = 6  # digits of a decimal that stands for a number it was rounded from
POINTS = 6  # at which two expressions with variables are compared
ENOUGH = 3  # of them, at which both have a value
LOG_BASES = (10, 0)  # of a logarithm without one: 10, or e


def same_scalar(reference: Scalar, answer: Scalar) -> bool:
    """Tell whether `answer` is the quantity that `reference` is, worked out where that is a number.
    A unit that only one of them names is that of the other; 50% is 50 and 0.5."""
    units = {reference.unit, answer.unit} - {""}
    if len(units) > 1:
        return False
    if infinite(reference) or infinite(answer):
        return infinite(reference) == infinite(answer)
    one, other = reference.term, answer.term
    if same_term(one, other):
        return True
    if units == {PERCENT} and reference.unit != answer.unit:
        percent = Number(HUNDREDTH)
        if reference.unit:
            return same_term(Product((one, percent)), other)
        return same_number(one, Product((other, percent))) and worked_out(one, other)
    return False


def same_term(reference: Term, answer: Term) -> bool:
    """Compare two expressions; numbers must be worked out, as far as the reference is, and hold no
    variables, even such as cancel."""
    if names(reference):
        return same_expression(reference, answer)
    if names(answer):
        return False
    return same_number(reference, answer) and worked_out(reference, answer)


def same_number(reference: Term, answer: Term) -> bool:
    """Compare the values of two expressions without variables. What has none is not the same."""
    bases = LOG_BASES if _bare_log(reference) or _bare_log(answer) else LOG_BASES[:1]
    for base in bases:
        try:
            one, other = evaluate(reference, {}, base), evaluate(answer, {}, base)
            if _equal(one, other) or _both_vanish(reference, answer, base):
                return True
        except Unreadable:
            return False
        if _rounded(reference, one, other) or _rounded(answer, other, one):
            return True
    return False


def same_expression(reference: Term, answer: Term) -> bool:
    """Compare two expressions at some points; variables that differ by case alone are the same."""
    ours, theirs = names(answer), names(reference)
    lower = {name.lower() for name in ours}
    alike = lower == {name.lower() for name in theirs} and len(lower) == len(ours) == len(theirs)
    fold = ours != theirs and alike
    bases = LOG_BASES if _bare_log(reference) or _bare_log(answer) else LOG_BASES[:1]
    return any(_agree(_ratios(reference, answer, base, fold)) for base in bases)


def proportional(reference: Term, answer: Term) -> Value | None:
    """Find by which factor `answer` is always larger, None where there is no such factor."""
    ratios = _ratios(reference, answer, 10)
    if len(ratios) < ENOUGH or not ratios[0]:
        return None
    first = ratios[0]
    return first if all(_equal(first, ratio) for ratio in ratios) else None


def _agree(ratios: list[Value]) -> bool:
    return len(ratios) >= ENOUGH and all(_equal(ratio, Fraction(1)) for ratio in ratios)


def _ratios(reference: Term, answer: Term, base: int, fold: bool = False) -> list[Value]:
    """Divide values of `answer` by those of `reference`, at points where both have one; to `fold`
    is to give a letter one value in both cases."""
    variables = sorted(names(reference) | names(answer))
    draw = random.Random("points")
    ratios: list[Value] = []
    for point in range(POINTS):
        drawn: dict[str, Value] = {}
        for name in variables:
            size = PRECISE.sqrt(draw.randint(2, 400)) / 7
            size = -size if point % 2 and draw.random() < 0.7 else size
            drawn.setdefault(name.lower() if fold else name, size)
        values = {name: drawn[name.lower() if fold else name] for name in variables}
        try:
            one, other = evaluate(reference, values, base), evaluate(answer, values, base)
        except Unreadable:
            continue
        small = PRECISE.mpf(10) ** (10 - DIGITS)
        if abs(precise(one)) < small and abs(precise(other)) < small:
            ratios.append(Fraction(1))
        elif abs(precise(one)) < small:
            ratios.append(Fraction(0))
        else:
            ratios.append(precise(other) / precise(one))
    return ratios


def _bare_log(term: Term) -> bool:
    if isinstance(term, Call) and term.name == "log" and term.base is None:
        return True
    return any(map(_bare_log, parts(term)))


def _equal(one: Value, other: Value) -> bool:
    if isinstance(one, Fraction) and isinstance(other, Fraction):
        return one == other
    first, second = precise(one), precise(other)
    return abs(first - second) <= RELATIVE * max(abs(first), abs(second))


def _both_vanish(one: Term, other: Term, base: int) -> bool:
    """Tell whether one is 0 and the other gets smaller the more digits are taken."""
    values = [evaluate(term, {}, base) for term in (one, other)]
    if sum(isinstance(value, Fraction) and value == 0 for value in values) != 1:
        return False
    term = other if isinstance(values[0], Fraction) and values[0] == 0 else one
    coarse = abs(precise(evaluate(term, {}, base)))
    with PRECISE.workdps(2 * DIGITS):
        return abs(precise(evaluate(term, {}, base))) <= coarse * 1e-20


def _rounded(decimal: Term, value: Value, exact: Value) -> bool:
    """Tell whether `decimal`, of that `value`, is what `exact` was rounded to or cut off at."""
    written = _written(decimal)
    if written is None or not written.step or written.digits < SIGNIFICANT:
        return False
    difference = abs(precise(value) - precise(exact))
    size = abs(precise(value))
    if written.digits >= 12 and difference <= APPROXIMATE * size:
        return True
    return difference < precise(written.step) * size / abs(precise(written.value)) * (1 - 1e-12)


def rounds(exact: Term, decimal: Term) -> bool:
    """Tell whether `decimal`, of however few digits, is what `exact` is rounded to or cut off at.
    Zeros at the end of a whole number may be rounded too."""
    written = _written(decimal)
    if written is None:
        return False
    try:
        one, other = precise(evaluate(exact, {}, 10)), precise(evaluate(decimal, {}, 10))
    except Unreadable:
        return False
    step = written.step
    if not step and written.value.denominator == 1:
        digits = str(abs(written.value.numerator))
        step = Fraction(10 ** (len(digits) - len(digits.rstrip("0"))), 2)
    return abs(one - other) <= precise(step) * abs(other) / abs(precise(written.value))


def _written(term: Term) -> Number | None:
    """Find the decimal that `term` is, but for a sign or a power of ten."""
    match term:
        case Number(value) if value:
            return term
        case Negative(inner):
            return _written(inner)
        case Product((number, Power(Number(value), _))) if value == 10:
            return _written(number)
        case Product((number, Number(value))) | Quotient(number, Number(value)) if value in (
            HUNDREDTH,
            100,
        ):
            return _written(number)
    return None


def worked_out(reference: Term, answer: Term) -> bool:
    """Tell whether `answer` leaves nothing over that `reference` does not leave over too."""
    try:
        left = left_over(answer)
        if not left:
            return True
        allowed = left_over(reference)
    except Unreadable:
        return False
    written = _written(reference)
    if written is not None and written.step and written.digits >= SIGNIFICANT:
        calls = {"a logarithm", "a power of a sum"}  # an exact form of what is rounded
        allowed = allowed | calls | {name for name in left if holds(answer, Call, name)}
        return CALCULATION not in left and left <= allowed
    return CALCULATION in allowed or left <= allowed
