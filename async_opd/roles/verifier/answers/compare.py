"""Whether an answer is the same as a reference."""

from async_opd.roles.verifier.answers.ranges import ranges, same_inequality, same_ranges
from async_opd.roles.verifier.answers.reading import read
from async_opd.roles.verifier.answers.shapes import (
    Based,
    Group,
    Interval,
    Ratio,
    Relation,
    Scalar,
    Shape,
    Text,
    is_range,
)
from async_opd.roles.verifier.answers.terms import (
    Name,
    Negative,
    Number,
    Quotient,
    Sum,
    names,
)
from async_opd.roles.verifier.answers.tokens import CONSTANTS, GREEK
from async_opd.roles.verifier.answers.units import unwrap_text
from async_opd.roles.verifier.answers.values import (
    proportional,
    rounds,
    same_number,
    same_scalar,
    same_term,
)

EQUAL = {"=", "in", "equiv", "approx"}


def read_wanted(text: str) -> list[Shape]:
    """List the readings of a tidy reference: letters whose order counts are no product."""
    readings = read(text)
    words = [one for one in readings if isinstance(one, Text)]
    letters_alone: list[Shape] = [*words]
    plain = unwrap_text(text).replace(" ", "")
    for word in words:
        letters = word.words
        in_order = (
            letters == text.strip()
            and letters.islower()
            and (len(letters) < 3 or sorted(letters) == list(letters))
        )
        named = letters in GREEK or letters in CONSTANTS
        if len(letters) > 1 and letters == plain and not in_order and not named:
            return letters_alone
    return readings


def is_number(shape: Shape) -> bool:
    """Tell whether `shape` holds numbers and nothing else."""
    match shape:
        case Scalar(term):
            return not names(term)
        case Based():
            return True
        case Interval(low, high):
            return is_number(low) and is_number(high)
        case Group(_, members) | Ratio(members):
            return all(map(is_number, members))
        case Relation(signs, members):
            return is_label(members[0]) and set(signs) <= EQUAL and all(map(is_number, members[1:]))
    return False


def is_label(shape: Shape) -> bool:
    """Tell whether `shape` only names what an equation is about: it holds no numbers alone."""
    match shape:
        case Text():
            return True
        case Scalar(term):
            return bool(names(term))
        case Group(_, members):
            return all(map(is_label, members))
    return False


def same(wanted: Shape, answer: Shape) -> bool:
    """Tell whether `answer` is what is `wanted`."""
    if isinstance(answer, Relation) and set(answer.signs) <= EQUAL:
        if isinstance(wanted, Relation):
            return _same_relations(wanted, answer)
        return any(same(wanted, value) for value in stated(answer))
    if isinstance(wanted, Relation) and set(wanted.signs) <= EQUAL:
        return any(same(value, answer) for value in stated(wanted))
    if is_range(wanted) or is_range(answer) or _is_union(wanted) or _is_union(answer):
        return _same_ranges(wanted, answer)
    match wanted, answer:
        case Text(one), Text(other):
            return one == other or (len(one) == 1 and one.lower() == other.lower())
        case Scalar(), Scalar():
            return same_scalar(wanted, answer)
        case Based(), Based():
            return wanted == answer
        case Ratio(), Ratio():
            return _same_ratios(wanted, answer)
        case (Ratio(), Scalar()) | (Scalar(), Ratio()):
            return _same_quotient(wanted, answer)
        case Group(), Group():
            return _same_groups(wanted, answer)
        case (Group("set", (one,)), Scalar()):
            return same(one, answer)
        case (Scalar(), Group("set", (other,))):
            return same(wanted, other)
    return False


def stated(relation: Relation) -> list[Shape]:
    """List what a chain of equal members states: its last one, and the last before each "about".
    Nothing, where members are not equal."""
    signs, members = list(relation.signs), list(relation.members)
    if len(members) == 2 and not is_label(members[0]) and is_label(members[1]):
        members.reverse()
    if is_label(members[0]):
        signs, members = signs[1:], members[1:]
    while len(members) > 1 and is_label(members[0]) and is_number(members[-1]):
        signs, members = signs[1:], members[1:]
    values = [members[0]]
    for sign, one, other in zip(signs, members, members[1:], strict=False):
        if sign == "approx":
            if not _near(one, other):
                return []
            values.append(other)
        elif not _same_values(one, other):
            return []
        else:
            values[-1] = other
    return values


def _same_values(one: Shape, other: Shape) -> bool:
    """Compare two members of a chain, of which neither need be worked out."""
    match one, other:
        case Scalar(first), Scalar(second) if not names(first) and not names(second):
            return same_number(first, second)
    return same(one, other) or same(other, one)


def _near(one: Shape, other: Shape) -> bool:
    """Tell whether `one` is rounded to `other`, or cut off there."""
    match one, other:
        case Scalar(first), Scalar(second):
            return rounds(first, second)
    return False


def _same_relations(wanted: Relation, answer: Relation) -> bool:
    """Compare equations: of one name each by what they state, else by their difference."""
    if not set(wanted.signs) <= EQUAL:
        return any(same(wanted, value) for value in stated(answer))
    match wanted.members[0], answer.members[0]:
        case Scalar(Name(one)), Scalar(Name(other)) if one.lower() != other.lower():
            if is_number(wanted.members[-1]):
                return False  # another name for the same number
        case Scalar(Name()), Scalar(Name()):
            values = [(a, b) for a in stated(wanted) for b in stated(answer)]
            return any(same(a, b) for a, b in values)
    values = [(a, b) for a in stated(wanted) for b in stated(answer)]
    if same(wanted.members[0], answer.members[0]) and any(same(a, b) for a, b in values):
        return True
    match wanted.members, answer.members:
        case (Scalar(a), Scalar(b)), (Scalar(c), Scalar(d)):
            ours, theirs = Sum((a, Negative(b))), Sum((c, Negative(d)))
            return bool(names(ours)) and proportional(ours, theirs) is not None
    return False


def _is_union(shape: Shape) -> bool:
    return isinstance(shape, Group) and shape.kind in ("union", "both", "minus")


def _same_ranges(wanted: Shape, answer: Shape) -> bool:
    match wanted, answer:
        case Relation(), Relation() if same_inequality(wanted, answer):
            return True
        case Group(), Group() if wanted.kind == answer.kind and _same_groups(wanted, answer):
            return True
    merged = [_merged(one) for one in (wanted, answer)]
    if merged != [wanted, answer]:
        return same(*merged)
    ours, theirs = ranges(wanted), ranges(answer)
    if ours is not None and theirs is not None:
        return same_ranges(ours, theirs)
    match wanted, answer:
        case Interval(), Interval():
            ends = same(wanted.low, answer.low) and same(wanted.high, answer.high)
            low, high = wanted.open_low == answer.open_low, wanted.open_high == answer.open_high
            return ends and low and high
    return False


def _merged(shape: Shape) -> Shape:
    """Join finite sets in a union to one."""
    if isinstance(shape, Group) and shape.kind == "union":
        sets = [one for one in shape.members if isinstance(one, Group) and one.kind == "set"]
        if len(sets) == len(shape.members):
            return Group("set", tuple(member for one in sets for member in one.members))
    return shape


def _same_ratios(wanted: Ratio, answer: Ratio) -> bool:
    ours, theirs = wanted.members, answer.members
    if len(ours) != len(theirs) or wanted.padded != answer.padded:
        return False
    if all(map(same, ours, theirs)):
        return True
    if wanted.padded or (_is_clock(wanted) and _is_clock(answer)):
        return False
    match ours, theirs:
        case (Scalar(a, ""), Scalar(b, "")), (Scalar(c, ""), Scalar(d, "")):
            return same_term(Quotient(a, b), Quotient(c, d))
    return False


def _is_clock(ratio: Ratio) -> bool:
    """Tell whether a clock may show it: two digits below 60 behind the colon."""
    match ratio.members:
        case (Scalar(Number(hour)), Scalar(Number(minute))):
            return hour <= 24 and 10 <= minute < 60
    return False


def _same_quotient(wanted: Shape, answer: Shape) -> bool:
    """Compare 1:2 with 1/2."""
    match wanted:
        case Scalar(Number(value)) if value.denominator == 1:
            return False  # 470:2 is no whole number worked out
    terms = []
    for shape in (wanted, answer):
        match shape:
            case Ratio((Scalar(top), Scalar(bottom)), False):
                terms.append(Quotient(top, bottom))
            case Scalar(term):
                terms.append(term)
    return len(terms) == 2 and same_term(*terms)


def _same_groups(wanted: Group, answer: Group) -> bool:
    ours, theirs = _vector(wanted), _vector(answer)
    kinds = (ours.kind, theirs.kind)
    if kinds in (("set", "set"), ("set", "list")):
        each = [[same(one, other) for other in theirs.members] for one in ours.members]
        return (
            all(map(any, each))
            and all(map(any, zip(*each, strict=True)))
            and (bool(ours.members) == bool(theirs.members))
        )
    if kinds == ("matrix", "matrix") and ours.columns != theirs.columns:
        return False
    if len(ours.members) != len(theirs.members):
        return False
    if kinds in (("list", "list"), ("list", "set"), ("union", "union")) and not _letters(ours):
        return _matched(ours.members, theirs.members)
    ordered = {("tuple", "tuple"), ("tuple", "list"), ("list", "tuple"), ("matrix", "matrix"),
               ("list", "list")}  # fmt: skip
    return kinds in ordered and all(map(same, ours.members, theirs.members))


def _vector(group: Group) -> Group:
    """Take a matrix of one row or one column for a tuple."""
    if group.kind == "matrix" and 1 in (group.columns, len(group.members) // group.columns):
        return Group("tuple", group.members)
    return group


def _letters(group: Group) -> bool:
    """Tell whether it lists capital letters, whose order counts."""
    for member in group.members:
        match member:
            case Text(words) if words.isupper():
                pass
            case Scalar(Name(name)) if name.isupper():
                pass
            case _:
                return False
    return True


def _matched(ours: tuple[Shape, ...], theirs: tuple[Shape, ...]) -> bool:
    left = list(theirs)
    for one in ours:
        other = next((member for member in left if same(one, member)), None)
        if other is None:
            return False
        left.remove(other)
    return True
