"""Intervals, their unions, and the inequalities that say the same."""

from dataclasses import dataclass
from itertools import pairwise

from async_opd.roles.verifier.answers.shapes import (
    Group,
    Interval,
    Relation,
    Scalar,
    Shape,
    infinite,
)
from async_opd.roles.verifier.answers.terms import (
    Constant,
    Name,
    Negative,
    Sum,
    Term,
    Unreadable,
    evaluate,
    names,
)
from async_opd.roles.verifier.answers.values import proportional, same_scalar

UP, DOWN = Scalar(Constant("oo")), Scalar(Negative(Constant("oo")))
MIRRORED = {"<": ">", ">": "<", "le": "ge", "ge": "le", "ne": "ne"}


@dataclass(frozen=True)
class Range:
    low: Scalar
    high: Scalar
    open_low: bool
    open_high: bool


def ranges(shape: Shape) -> list[Range] | None:
    """List the ranges of an interval, a union of them, or an inequality of one variable, in order;
    None for anything else."""
    match shape:
        case Interval(Scalar() as low, Scalar() as high, open_low, open_high):
            return [Range(low, high, open_low, open_high)]
        case Group("tuple", (Scalar() as low, Scalar() as high)):
            return [Range(low, high, True, True)]
        case Relation(("in",), (Scalar(Name()), inner)):
            return ranges(inner)
        case Relation(signs, members):
            return _of_inequality(signs, members)
        case Group("minus", (whole, Group("set", points))):
            return _without(whole, points)
        case Group("union", members):
            each = [ranges(member) for member in members]
            if any(one is None for one in each):
                return None
            return _ordered([one for listed in each if listed for one in listed])
        case Group("both", (one, other)):
            return _both(ranges(one), ranges(other))
    return None


def same_ranges(reference: list[Range], answer: list[Range]) -> bool:
    """Compare range by range."""
    return len(reference) == len(answer) and all(map(_same, reference, answer))


def same_inequality(reference: Relation, answer: Relation) -> bool:
    """Tell whether two inequalities say the same, multiplied or mirrored as one likes."""
    if len(reference.signs) != 1 or len(answer.signs) != 1:
        return False
    ours, theirs = _difference(reference), _difference(answer)
    if ours is None or theirs is None:
        return False
    factor = proportional(ours, theirs)
    if factor is None:
        return False
    sign = answer.signs[0] if factor > 0 else MIRRORED[answer.signs[0]]
    return sign == reference.signs[0]


def _difference(relation: Relation) -> Term | None:
    match relation.members:
        case (Scalar(left), Scalar(right)):
            return Sum((left, Negative(right)))
    return None


def _of_inequality(signs: tuple[str, ...], members: tuple[Shape, ...]) -> list[Range] | None:
    """Read x > 2, 2 < x, 1 < x < 2 and x != 2, where x is any one variable."""
    if not all(isinstance(member, Scalar) for member in members):
        return None
    if not set(signs) <= set(MIRRORED):
        return None
    match members:
        case (Scalar(Name()), Scalar() as end):
            sign = signs[0]
        case (Scalar() as end, Scalar(Name())):
            sign = MIRRORED[signs[0]]
        case (Scalar() as low, Scalar(Name()), Scalar() as high):
            return _between(signs, low, high)
        case _:
            return None
    if names(end.term):
        return None
    if sign == "ne":
        return [Range(DOWN, end, True, True), Range(end, UP, True, True)]
    if sign in (">", "ge"):
        return [Range(end, UP, sign == ">", True)]
    return [Range(DOWN, end, True, sign == "<")]


def _between(signs: tuple[str, ...], low: Scalar, high: Scalar) -> list[Range] | None:
    if set(signs) <= {">", "ge"}:
        low, high = high, low
        signs = (MIRRORED[signs[1]], MIRRORED[signs[0]])
    if not set(signs) <= {"<", "le"}:
        return None
    return [Range(low, high, signs[0] == "<", signs[1] == "<")]


def _both(one: list[Range] | None, other: list[Range] | None) -> list[Range] | None:
    """Read "x > 1 and x < 2": what bounds from below and what bounds from above."""
    if one is None or other is None or len(one) != 1 or len(other) != 1:
        return None
    lower, upper = (one[0], other[0]) if infinite(one[0].high) else (other[0], one[0])
    if not infinite(lower.high) or not infinite(upper.low) or infinite(lower.low):
        return None
    return [Range(lower.low, upper.high, lower.open_low, upper.open_high)]


def _without(whole: Shape, points: tuple[Shape, ...]) -> list[Range] | None:
    around = ranges(whole)
    if around is None or len(around) != 1:
        return None
    if not all(isinstance(point, Scalar) for point in points):
        return None
    inner = [Range(one, one, True, True) for one in points if isinstance(one, Scalar)]
    ordered = _ordered(inner)
    if ordered is None:
        return None
    first, last = around[0], Range(around[0].high, UP, around[0].open_high, True)
    lows = [(first.low, first.open_low), *((one.low, True) for one in ordered)]
    highs = [*((one.low, True) for one in ordered), (last.low, last.open_low)]
    return [Range(low, high, a, b) for (low, a), (high, b) in zip(lows, highs, strict=True)]


def _ordered(listed: list[Range]) -> list[Range] | None:
    """Sort ranges by their lower ends, and join those that overlap nowhere but touch."""
    try:
        ordered = sorted(listed, key=lambda one: _place(one.low))
    except (Unreadable, TypeError):
        return None
    for one, following in pairwise(ordered):
        if one.high != following.low and _place(one.high) > _place(following.low):
            return None
    return ordered


def _place(end: Scalar) -> float:
    sign = infinite(end)
    return sign * float("inf") if sign else float(evaluate(end.term, {}, 10))


def _same(reference: Range, answer: Range) -> bool:
    ends = same_scalar(reference.low, answer.low) and same_scalar(reference.high, answer.high)
    low = infinite(reference.low) or reference.open_low == answer.open_low
    high = infinite(reference.high) or reference.open_high == answer.open_high
    return bool(ends and low and high)
