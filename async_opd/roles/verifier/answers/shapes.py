"""Sets, tuples, intervals, lists, matrices and relations around expressions."""

from dataclasses import dataclass

from async_opd.roles.verifier.answers.terms import Constant, Negative, Term
from async_opd.roles.verifier.answers.units import NO_UNIT


@dataclass(frozen=True)
class Text:
    """Words, or letters whose order counts; lower case but for letters alone."""

    words: str


@dataclass(frozen=True)
class Scalar:
    """An expression, with its unit if it has one."""

    term: Term
    unit: str = NO_UNIT


@dataclass(frozen=True)
class Based:
    """Digits in another base than ten."""

    digits: str
    base: int


@dataclass(frozen=True)
class Ratio:
    """Two or more terms with colons between them; `padded` where a clock writes them so."""

    members: "tuple[Shape, ...]"
    padded: bool


@dataclass(frozen=True)
class Group:
    """Members in an order ("tuple"), in none ("set", "list"), or in rows of `columns` each
    ("matrix")."""

    kind: str
    members: "tuple[Shape, ...]"
    columns: int = 0


@dataclass(frozen=True)
class Interval:
    """All between two ends; round brackets around two finite ends may also be a tuple."""

    low: "Shape"
    high: "Shape"
    open_low: bool
    open_high: bool


@dataclass(frozen=True)
class Relation:
    """Members with a sign between each two: = < > le ge ne in."""

    signs: tuple[str, ...]
    members: "tuple[Shape, ...]"


Shape = Text | Scalar | Based | Ratio | Group | Interval | Relation


def listed(members: list[Shape]) -> Group:
    """Put members in one list, those of lists among them one by one."""
    flat: list[Shape] = []
    for member in members:
        flat += member.members if isinstance(member, Group) and member.kind == "list" else [member]
    return Group("list", tuple(flat))


def is_range(shape: Shape) -> bool:
    """Tell whether `shape` is an interval or a relation of order."""
    return isinstance(shape, Interval) or (
        isinstance(shape, Relation)
        and any(sign in ("<", ">", "le", "ge", "ne") for sign in shape.signs)
    )


def infinite(shape: Shape) -> int:
    """Tell which infinity `shape` is: 1, -1, or 0 for none."""
    match shape:
        case Scalar(Constant("oo")):
            return 1
        case Scalar(Negative(Constant("oo"))):
            return -1
    return 0
