r"""Whether a number is worked out, or a calculation left as it stands.

A numeral, a fraction, a power or a root of numerals, a rational multiple of an irrational term and
a sum of unlike ones are worked out. What else an expression holds is listed by `left_over`: a
reference allows its responses what it holds itself, and one that holds CALCULATION allows all.
"""

from fractions import Fraction
from itertools import combinations

from async_opd.roles.verifier.answers.terms import (
    PRECISE,
    Call,
    Choose,
    Constant,
    Negative,
    Number,
    Power,
    Product,
    Quotient,
    Root,
    Sum,
    Term,
    Value,
    evaluate,
    parts,
    precise,
)

CALCULATION = "a calculation"
ALIKE = 1e-40
MOST_TERMS = 16  # of a sum, and factors of a product, that is worked out
LIKE = 32  # terms of one that is multiplied out
LARGEST_RATIO = 10**6  # numerator and denominator of what is taken for rational
IMAGINARY = Constant("i")
FAMILIES = {
    "log": "a logarithm",
    "ln": "a logarithm",
    "lg": "a logarithm",
    "factorial": "a factorial",
    "abs": CALCULATION,
    "floor": CALCULATION,
    "ceil": CALCULATION,
}


def left_over(term: Term) -> frozenset[str]:
    """List what in `term`, which has no variables, is still to be worked out."""
    inside = frozenset[str]().union(*map(left_over, parts(term)))
    match term:
        case Negative(Negative()):
            return inside | {CALCULATION}
        case Sum(terms):
            if len(terms) > MOST_TERMS or _like_terms(term):
                inside |= {CALCULATION}
            return inside
        case Product() | Quotient():
            return _of_factors(term)
        case Power():
            return inside | _of_power(term)
        case Root(under):
            return inside | _of_root(under)
        case Call(name):
            return inside | {FAMILIES.get(name, f"{name}")}
        case Choose():
            return inside | {"a binomial coefficient"}
    return inside


def is_numeral(term: Term) -> bool:
    """Tell whether `term` is a numeral or a fraction of two, with a sign or without."""
    match term:
        case Number():
            return True
        case Negative(inner):
            return not isinstance(inner, Negative) and is_numeral(inner)
        case Quotient(top, bottom, "/"):
            return _is_whole(top) and _is_whole(bottom)
    return False


def rational(value: Value) -> bool:
    """Tell whether `value` is rational with a small numerator and denominator, to forty digits."""
    if isinstance(value, Fraction):
        return True
    if abs(PRECISE.im(value)) > ALIKE:
        return False
    real = PRECISE.re(value)
    if not 1 / LARGEST_RATIO < abs(real) < LARGEST_RATIO:
        return abs(real) <= ALIKE or (abs(real) > 1 and real == PRECISE.floor(real))
    sign, mantissa, exponent, _ = real._mpf_
    exact = Fraction(int(-mantissa if sign else mantissa)) * Fraction(2) ** int(exponent)
    near = exact.limit_denominator(LARGEST_RATIO)
    return abs(real - precise(near)) <= ALIKE


def _value(term: Term) -> Value:
    return evaluate(term, {}, 10)


def _rational_ratio(one: Term, two: Term) -> bool:
    """Tell whether two terms are multiples of each other."""
    first, second = _value(one), _value(two)
    if not first or not second:
        return True  # to add nothing is to be worked out too
    if isinstance(first, Fraction) and isinstance(second, Fraction):
        return True
    return rational(precise(first) / precise(second))


def _expanded(term: Term) -> list[Term]:
    """List the terms of the sum that `term` is once it is multiplied out, but for their signs."""
    match term:
        case Negative(inner):
            return _expanded(inner)
        case Sum(terms):
            return [one for each in terms for one in _expanded(each)]
        case Quotient(top, bottom):
            return [Quotient(one, bottom) for one in _expanded(top)]
        case Product(factors):
            products: list[tuple[Term, ...]] = [()]
            for factor in factors:
                products = [(*all, one) for all in products[:LIKE] for one in _expanded(factor)]
            return [Product(product) for product in products]
    return [term]


def _like_terms(term: Term) -> bool:
    """Tell whether `term`, multiplied out, has two terms that are multiples of each other, or one
    whose irrational factors cancel."""
    terms = _expanded(term)
    return (
        len(terms) > LIKE
        or any(_rational_ratio(a, b) for a, b in combinations(terms, 2))
        or (len(terms) > 1 and any(_cancels(one) for one in terms))
    )


def _cancels(term: Term) -> bool:
    return rational(_value(term)) and not all(
        isinstance(_value(factor), Fraction) for factor in parts(term)
    )


def _is_signed(term: Term) -> bool:
    return isinstance(term.term if isinstance(term, Negative) else term, Number)


def _is_whole(term: Term) -> bool:
    return _is_signed(term) and _value(term).denominator == 1


def _flat(term: Term) -> tuple[list[Term], list[Term], bool]:
    """List the factors above and below, and whether one is divided by ÷."""
    match term:
        case Negative(inner) if not is_numeral(inner):
            return _flat(inner)
        case Product(factors):
            sides = [_flat(factor) for factor in factors]
            return (
                [one for top, _, _ in sides for one in top],
                [one for _, bottom, _ in sides for one in bottom],
                any(divided for _, _, divided in sides),
            )
        case Quotient(top, bottom, sign):
            above, below = _flat(top), _flat(bottom)
            divided = sign == "÷" or above[2] or below[2]
            return above[0] + below[1], above[1] + below[0], divided
    return [term], [], False


def _of_factors(term: Term) -> frozenset[str]:
    if is_numeral(term) or _is_scientific(term):
        return frozenset()
    above, below, divided = _flat(term)
    if len(above) + len(below) > MOST_TERMS:
        return frozenset([CALCULATION])
    inside = frozenset[str]().union(*map(left_over, above + below))
    rationals = [
        [one for one in side if isinstance(_value(one), Fraction)] for side in (above, below)
    ]
    irrational = [one for one in above + below if not isinstance(_value(one), Fraction)]
    if divided or max(map(len, rationals)) > 1:
        return inside | {CALCULATION}
    if not irrational:
        return inside | _of_fraction(above, below)
    if all(rationals) and any(isinstance(one, Power) for side in rationals for one in side):
        inside |= _of_fraction(*rationals)
    values = [precise(_value(one)) for one in irrational]
    merged = any(rational(a * b) or rational(a / b) for a, b in combinations(values, 2))
    if merged or rational(precise(_value(term))) or IMAGINARY in below or _like_terms(term):
        inside |= {CALCULATION}
    if any(isinstance(one, Sum) for one in below):
        inside |= {"a sum below a fraction's line"}
    if sum(isinstance(one, Sum) for one in above) > 1:
        inside |= {"a product of sums"}
    return inside


def _of_fraction(above: list[Term], below: list[Term]) -> frozenset[str]:
    """Judge a product that is rational: one numeral or power over another, in lowest terms."""
    if len(above) != 1 or len(below) != 1:
        return frozenset([CALCULATION])
    top, bottom = _value(above[0]), _value(below[0])
    if top.denominator != 1 or bottom.denominator != 1:
        return frozenset([CALCULATION])
    lowest = (top / bottom).denominator == abs(bottom)
    return frozenset() if lowest and abs(bottom) > 1 else frozenset([CALCULATION])


def _is_scientific(term: Term) -> bool:
    """Tell whether it is a numeral times a power of ten."""
    match term:
        case Product((number, Power(Number(Fraction(numerator=10, denominator=1)), exponent))):
            return _is_signed(number) and _is_signed(exponent)
    return False


def _of_power(term: Power) -> frozenset[str]:
    base = term.base
    if isinstance(term.exponent, Power) or base == IMAGINARY:
        return frozenset([CALCULATION])
    if is_numeral(base):
        return frozenset()
    if isinstance(base, Constant | Root) and not rational(_value(term)):
        return frozenset()
    if isinstance(base, Call | Choose) and not isinstance(_value(base), Fraction):
        return frozenset()
    return frozenset(["a power of a sum" if isinstance(base, Sum) else CALCULATION])


def _of_root(under: Term) -> frozenset[str]:
    if is_numeral(under):
        return frozenset()
    if isinstance(_value(under), Fraction):
        return frozenset([CALCULATION])
    nested = isinstance(under, Sum) or any(isinstance(part, Root) for part in parts(under))
    return frozenset(["a root of a root"]) if nested or isinstance(under, Root) else frozenset()
