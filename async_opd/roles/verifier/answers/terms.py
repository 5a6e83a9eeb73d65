"""Expressions as trees, and their values.

A value is a Fraction where it is rational and not too long, else one of mpmath to `DIGITS` digits.
"""

from dataclasses import dataclass
from fractions import Fraction
from functools import reduce
from math import comb, factorial
from operator import add, mul
from typing import Any

from mpmath import MPContext

DIGITS = 60
EXACT_BITS = 100_000  # longer than that, a power is no Fraction any more
MOST = 10**12  # bits before the point, or after it, of any value
ARGUMENT = 10**30  # above it a function is not evaluated
COUNTED = 3000  # above it a factorial is no Fraction

Value = Any  # Fraction, or mpf or mpc of mpmath
PRECISE = MPContext()
PRECISE.dps = DIGITS


class Unreadable(ValueError):
    """A text that is no expression, or one whose value cannot be had."""


@dataclass(frozen=True)
class Number:
    """A numeral. `step` is the worth of its last digit and `digits` how many are significant, where
    it is written as a decimal; both 0 where it is not."""

    value: Fraction
    step: Fraction = Fraction(0)
    digits: int = 0


@dataclass(frozen=True)
class Name:
    """A variable."""

    name: str


@dataclass(frozen=True)
class Constant:
    """One of pi, e, i and oo."""

    name: str


@dataclass(frozen=True)
class Negative:
    term: "Term"


@dataclass(frozen=True)
class Sum:
    terms: "tuple[Term, ...]"


@dataclass(frozen=True)
class Product:
    factors: "tuple[Term, ...]"


@dataclass(frozen=True)
class Quotient:
    """`top` over `bottom`; `sign` as it stands between them: "/" also for a fraction, or ÷."""

    top: "Term"
    bottom: "Term"
    sign: str = "/"


@dataclass(frozen=True)
class Power:
    base: "Term"
    exponent: "Term"


@dataclass(frozen=True)
class Root:
    term: "Term"
    index: "Term"


@dataclass(frozen=True)
class Call:
    """A function of one term; `base` is that of a logarithm."""

    name: str
    term: "Term"
    base: "Term | None" = None


@dataclass(frozen=True)
class Choose:
    """A binomial coefficient."""

    total: "Term"
    chosen: "Term"


Term = Number | Name | Constant | Negative | Sum | Product | Quotient | Power | Root | Call | Choose


def parts(term: Term) -> tuple[Term, ...]:
    """List the terms directly inside `term`."""
    match term:
        case Sum(terms) | Product(terms):
            return terms
        case Negative(inner):
            return (inner,)
        case Quotient(one, two) | Power(one, two) | Root(one, two) | Choose(one, two):
            return one, two
        case Call(_, inner, base):
            return (inner,) if base is None else (inner, base)
    return ()


def names(term: Term) -> frozenset[str]:
    """List the variables of `term`."""
    if isinstance(term, Name):
        return frozenset([term.name])
    return frozenset[str]().union(*map(names, parts(term)))


def holds(term: Term, kind: type, name: str | None = None) -> bool:
    """Tell whether `term` is, or has inside, one of `kind`, with that `name` if one is asked."""
    if isinstance(term, kind) and name in (None, getattr(term, "name", None)):
        return True
    return any(holds(part, kind, name) for part in parts(term))


def precise(value: Value) -> Value:
    """Turn a Fraction into a number of mpmath."""
    if isinstance(value, Fraction):
        return PRECISE.mpf(value.numerator) / value.denominator
    return value


def evaluate(term: Term, values: dict[str, Value], log_base: int) -> Value:
    """Evaluate `term` with variables as in `values`; `log_base` is that of a logarithm without one,
    0 for e. Raises Unreadable where there is no finite value, or none of sensible size."""
    try:
        value = _evaluate(term, values, log_base)
    except (ArithmeticError, ValueError, TypeError, KeyError) as error:
        raise Unreadable(f"no value: {error}") from error
    if not isinstance(value, Fraction) and not PRECISE.isfinite(value):
        raise Unreadable("no finite value")
    return value


def _evaluate(term: Term, values: dict[str, Value], log_base: int) -> Value:
    inside = [_evaluate(part, values, log_base) for part in parts(term)]
    match term:
        case Number(value):
            return value
        case Name(name):
            return values[name]
        case Constant("oo"):
            raise Unreadable("infinite")
        case Constant(name):
            return {"pi": +PRECISE.pi, "e": +PRECISE.e, "i": PRECISE.mpc(0, 1)}[name]
        case Negative():
            return -inside[0]
        case Sum():
            return reduce(add, _alike(inside))
        case Product():
            return reduce(mul, _alike(inside))
        case Quotient():
            top, bottom = _alike(inside)
            return top / bottom
        case Power():
            return power(*inside)
        case Root():
            return power(inside[0], _inverse(inside[1]))
        case Choose():
            return _choose(*inside)
        case Call(name):
            return _call(name, inside, log_base)


def _alike(values: list[Value]) -> list[Value]:
    """Make all numbers of mpmath, unless all are Fractions."""
    if all(isinstance(value, Fraction) for value in values):
        return values
    return [precise(value) for value in values]


def _inverse(value: Value) -> Value:
    return 1 / value


def power(base: Value, exponent: Value) -> Value:
    """Raise `base` to `exponent`: the real root where the exponent has an odd denominator."""
    if not base:
        if exponent == 0:
            raise Unreadable("0^0")
        return base if PRECISE.re(precise(exponent)) > 0 else 1 / base
    size = abs(PRECISE.log(abs(precise(base)), 2)) * abs(precise(exponent))
    if size > MOST:
        raise Unreadable("too large a power")
    if not isinstance(exponent, Fraction):
        return PRECISE.power(precise(base), exponent)
    if exponent.denominator == 1:
        if isinstance(base, Fraction):
            longest = max(abs(base.numerator), base.denominator).bit_length()
            if longest * abs(exponent) <= EXACT_BITS:
                return base ** int(exponent)
        return PRECISE.power(precise(base), int(exponent))
    real = PRECISE.im(precise(base)) == 0
    if real and exponent.denominator % 2 and PRECISE.re(precise(base)) < 0:
        root = PRECISE.power(-precise(base), precise(exponent))
        return -root if exponent.numerator % 2 else root
    return PRECISE.power(precise(base), precise(exponent))


def _choose(total: Value, chosen: Value) -> Value:
    whole = all(isinstance(v, Fraction) and v.denominator == 1 for v in (total, chosen))
    if whole and chosen >= 0 and 0 <= total <= COUNTED:
        return Fraction(comb(int(total), int(chosen)))
    _bounded(total)
    _bounded(chosen)
    return PRECISE.binomial(precise(total), precise(chosen))


def _bounded(value: Value) -> None:
    if abs(precise(value)) > ARGUMENT:
        raise Unreadable("too large an argument")


def _call(name: str, inside: list[Value], log_base: int) -> Value:
    value = inside[0]
    if name in ("log", "ln", "lg"):
        base = {"log": log_base, "lg": 10, "ln": 0}[name]
        base = inside[1] if len(inside) > 1 else base
        logarithm = PRECISE.log(precise(value))
        return logarithm / PRECISE.log(precise(base)) if base else logarithm
    if name == "abs":
        return abs(value)
    _bounded(value)
    if name in ("floor", "ceil"):
        return Fraction(int(getattr(PRECISE, name)(precise(value))))
    if name == "factorial":
        if isinstance(value, Fraction) and value.denominator == 1 and 0 <= value <= COUNTED:
            return Fraction(factorial(int(value)))
        if abs(precise(value)) > 10**9:
            raise Unreadable("too large a factorial")
        return PRECISE.factorial(precise(value))
    return getattr(PRECISE, name)(precise(value))
