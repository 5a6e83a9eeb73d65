"""Text to shapes. A text may have several readings: 5 m is five metres or a product, 3,500 a
number or two.
"""

import re
from itertools import product

from async_opd.roles.verifier.answers.expression import read_expression
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
    listed,
)
from async_opd.roles.verifier.answers.terms import Number, Unreadable
from async_opd.roles.verifier.answers.units import WRAP, split_unit, unwrap_text
from async_opd.roles.verifier.answers.writing import WORDS

MOST_READINGS = 16
MOST_MEMBERS = 64

OPENING, CLOSING = "([{⦃", ")]}⦄"
SEPARATOR = re.compile(r",(?!\})|;|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])|&(?!\w)")
UNION = re.compile(r"\\cup(?![A-Za-z])|(?<![A-Za-z\\])or(?![A-Za-z])|(?<= )U(?= )")
MINUS = re.compile(r"\\setminus(?![A-Za-z])")
SIGN = re.compile(r"\\(?:le|ge|ne|in|approx|equiv)(?![A-Za-z])|[=<>]")
COLON = re.compile(r":")
ROW = re.compile(r"\\\\")
COLUMN = re.compile(r"&")
MATRIX = re.compile(
    r"^(?:[(\[|⦃]\s*)?\\begin\{([pbBvV]?matrix|array)\}(?:\{[lcr|]*\})?(.*)\\end\{\1\}"
    r"(?:\s*[)\]|⦄])?$"
)
# Those x for which it holds that.
BUILDER = re.compile(
    r"^⦃\s*([a-z])\s*(?:\\in\s*\(-\\infty\s*,\\infty\s*\)\s*)?[|:]"
    r"(?=.*(?<![A-Za-z\\])\1(?![A-Za-z]))(.*)⦄$"
)
CASES = re.compile(r"^⦃?\s*\\begin\{(?:cases|aligned)\}([^&]*)\\end\{(?:cases|aligned)\}$")
LETTERS = re.compile(r"[A-Z](?:\s*[A-Z])+")
CHOICE = re.compile(
    r"^\\(?:text|textbf|mathrm|mathbf|bf)\s*\{\s*\(?([A-J])\)?[.:]?\s*\}(?:\s*[.:])?\s*(.*)$"
)
LABEL = re.compile(r"^\(?([A-J])(?:[).:]\s+|\)$)(.*)$")
ANOTHER = re.compile(r"(?<![A-Za-z])[A-J][).:]|\{\s*\(?[A-J]\)?[.:]?\s*\}")  # letter of a choice
BASES = {name: base for base, name in enumerate(WORDS)} | {"sixteen": 16}
BASED = re.compile(
    r"^\(?(-?(?=[A-Fa-f]*\d)[0-9A-Fa-f]+)\)?\s*(?:_\s*\{?\s*\(?\s*|\s+base\s+|\s+in base\s+)"
    rf"(\d+|{'|'.join(BASES)})\s*\)?\s*" + r"\}?$"
)
COMMA_NUMBER = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
BRACKET = re.compile(r"[(\[⦃]")  # where commas separate
DECIMAL_COMMA = re.compile(r"^-?\d+,\d+$")
# Inside or around words: a minus, or the prime of a letter, is neither.
HYPHEN = re.compile(r"(?<=[^\W\d_]{3})-(?=[^\W\d_])|(?<=[^\W\d_])-(?=[^\W\d_]{3})")
QUOTE = re.compile(r"[\".]|(?<![^\W\d_])'|(?<=[^\W\d_]{2})'|(?<=[^\W\d_])'(?=[^\W\d_]{2})")
PAIRS = {"(": ")", "[": "]", "{": "}", "⦃": "⦄"}


def split(text: str, separator: re.Pattern) -> list[str]:
    """Cut `text` at each `separator` that stands in no brackets."""
    cut: list[str] = []
    depth = start = 0
    place = 0
    while place < len(text):
        letter = text[place]
        depth += (letter in OPENING) - (letter in CLOSING)
        match = separator.match(text, place) if depth <= 0 else None
        if match:
            cut += [text[start:place], match[0]]
            start = place = match.end()
        else:
            place += 2 if letter == "\\" and text[place + 1 : place + 2] in tuple("{}()[]") else 1
    return [*cut, text[start:]]


def read(text: str) -> list[Shape]:
    """List the readings of a tidy `text`. Raises Unreadable where it has none."""
    if whole := WRAP.fullmatch(text):
        text = whole[1].strip()
    readings = _numbers_with_commas(text) + _signs(text)
    choice = CHOICE.match(text) or LABEL.match(text)
    if choice and not ANOTHER.search(choice[2]):
        readings += [Text(choice[1]), *(_read_or_none(choice[2]) if choice[2] else [])]
    readings += _read_or_none(text)
    if words := _words(text):
        readings.append(words)
    if not readings:
        raise Unreadable(f"{text!r} has no reading")
    return readings[:MOST_READINGS]


def _read_or_none(text: str) -> list[Shape]:
    try:
        return _read(text)
    except Unreadable:
        return []


def _numbers_with_commas(text: str) -> list[Shape]:
    """Read 3,500 as one number, and 0,5 as a decimal."""
    if not BRACKET.search(text) and COMMA_NUMBER.search(text):
        return _read_or_none(COMMA_NUMBER.sub(lambda m: m[0].replace(",", ""), text))
    if DECIMAL_COMMA.match(text):
        return _read_or_none(text.replace(",", "."))
    return []


def _signs(text: str) -> list[Shape]:
    r"""Read \pm as both signs."""
    if not re.search(r"\\(?:pm|mp)(?![A-Za-z])", text):
        return []
    upper = re.sub(r"\\mp(?![A-Za-z])", "-", re.sub(r"\\pm(?![A-Za-z])", "+", text))
    lower = re.sub(r"\\mp(?![A-Za-z])", "+", re.sub(r"\\pm(?![A-Za-z])", "-", text))
    both = product(_read_or_none(upper), _read_or_none(lower))
    return [listed([one, other]) for one, other in both]


def _words(text: str) -> Text | None:
    """Read words, and capital letters whose order counts."""
    plain = HYPHEN.sub(" ", QUOTE.sub("", unwrap_text(text.replace("$", ""))))
    plain = plain[1:-1] if re.fullmatch(r"\([A-Za-z]+\)", plain) else plain
    if LETTERS.fullmatch(plain):
        return Text(plain.replace(" ", ""))
    plain = re.sub(r"\s+", " ", plain).strip()
    if re.fullmatch(r"[^\W\d_]+(?: [^\W_]+)*", plain):
        return Text(plain if len(plain) == 1 else plain.lower())
    return None


def _read(text: str) -> list[Shape]:
    text = text.strip().rstrip(",;").strip()
    if not text:
        raise Unreadable("nothing")
    if match := CASES.match(text):
        text = ", ".join(part.strip(" ,") for part in split(match[1], ROW)[::2])
    if (match := BUILDER.match(text)) and SIGN.search(match[2]):
        return _read(match[2])
    if match := MATRIX.match(text):
        return [_matrix(match[2])]
    parts = [part for part in split(text, SEPARATOR)[::2] if part.strip()]
    if len(parts) > 1:
        return _listed(text, parts)
    unions = [part for part in split(text, UNION)[::2] if part.strip()]
    if len(unions) > 1:
        return [Group("union", members) for members in _each(unions)]
    minus = split(text, MINUS)[::2]
    if len(minus) == 2:
        return [Group("minus", members) for members in _each(minus)]
    related = split(text, SIGN)
    if len(related) > 1:
        return _related(related)
    return _bracketed(text) or _scalar(text)


def _each(parts: list[str]) -> list[tuple[Shape, ...]]:
    """List the ways to read all of `parts`."""
    if len(parts) > MOST_MEMBERS:
        raise Unreadable("too many members")
    ways: list[tuple[Shape, ...]] = [()]
    for part in parts:
        readings = (_signs(part) or _read_or_none(part)) + [w for w in [_words(part)] if w]
        if not readings:
            raise Unreadable(f"{part!r} has no reading")
        ways = [(*way, one) for way in ways for one in readings][:MOST_READINGS]
    return ways


def _listed(text: str, parts: list[str]) -> list[Shape]:
    """Read a list; one of ranges joined by "or" is their union."""
    ways = _each(parts)
    if "," not in text or " or" in text:
        ranges = [way for way in ways if all(isinstance(o, Relation) and is_range(o) for o in way)]
        if ranges:
            united = re.search(r"(?<![A-Za-z])or(?![A-Za-z])", text)
            return [Group("union" if united else "both", way) for way in ranges]
    return [listed(list(way)) for way in ways]


def _related(parts: list[str]) -> list[Shape]:
    signs = tuple(sign.strip("\\") for sign in parts[1::2])
    members = parts[::2]
    if not members[0].strip() and signs[0] in ("=", "approx"):
        signs, members = signs[1:], members[1:]
    if not signs:
        return _read(members[0])
    label: list[Shape] = []
    if len(members) > 1 and signs[0] == "=" and re.search(r"[A-Za-z]", members[0]):
        label = _read_or_none(members[0]) or [Text(members[0].strip())]
    ways = _each(members[1:] if label else members)
    if not label:
        return [Relation(signs, way) for way in ways]
    return [Relation(signs, (first, *way)) for first in label for way in ways]


def _bracketed(text: str) -> list[Shape]:
    """Read what stands in one pair of brackets, [] where it is none of a group."""
    opening, closing = text[0], text[-1]
    inner = text[1:-1]
    if opening not in OPENING or closing not in CLOSING or len(text) < 2 or not _closes_last(text):
        return []
    parts = [part for part in split(inner, SEPARATOR)[::2]]
    if opening in "{⦃":
        if PAIRS[opening] != closing or (opening == "{" and len(parts) == 1):
            return []
        empty = not inner.strip()
        ways = [()] if empty else _each(parts)
        return [Group("set", listed(list(way)).members) for way in ways]
    if len(parts) == 1:
        return [] if opening == "(" else [Group("tuple", way) for way in _each(parts)]
    ways = _each(parts)
    if opening + closing == "()" or (opening + closing == "[]" and len(parts) > 2):
        tuples: list[Shape] = [Group("tuple", way) for way in ways]
        return [_rows(one) for one in tuples]
    if len(parts) == 2:
        nested = [way for way in ways if all(isinstance(one, Group | Interval) for one in way)]
        if opening + closing == "[]" and nested:
            return [_rows(Group("tuple", way)) for way in nested]
        return [Interval(low, high, opening == "(", closing == ")") for low, high in ways]
    return []


def _rows(shape: Shape) -> Shape:
    """Take a tuple of rows of one length, written [[1, 2], [3, 4]], for a matrix."""
    if isinstance(shape, Group) and shape.kind == "tuple":
        rows = [
            (one.low, one.high) if isinstance(one, Interval) and not one.open_low else ()
            for one in shape.members
        ]
        if all(rows):
            return Group("matrix", tuple(cell for row in rows for cell in row), 2)
    return shape


def _closes_last(text: str) -> bool:
    """Tell whether the first bracket is closed by the last letter."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter in OPENING) - (letter in CLOSING)
        if depth == 0:
            return place == len(text) - 1
    return False


def _matrix(inner: str) -> Shape:
    rows = [part for part in split(inner, ROW)[::2] if part.strip()]
    cells = [[cell for cell in split(row, COLUMN)[::2]] for row in rows]
    if len({len(row) for row in cells}) != 1:
        raise Unreadable("rows of unlike lengths")
    members = _each([cell for row in cells for cell in row])[0]
    return Group("matrix", members, len(cells[0]))


def _scalar(text: str) -> list[Shape]:
    if based := BASED.match(unwrap_text(text)):
        base = int(based[2]) if based[2].isdigit() else BASES[based[2]]
        return [Based(based[1].upper(), base)]
    if text == "\\emptyset":
        return [Group("set", ())]
    ratio = split(text, COLON)[::2]
    if len(ratio) > 1:
        padded = any(re.match(r"0\d", part.strip()) for part in ratio[1:])
        ways = [way for way in _each(ratio) if not padded or all(map(_is_counted, way))]
        return [Ratio(way, padded) for way in ways]
    readings: list[Shape] = []
    for number, unit in split_unit(text):
        try:
            term = read_expression(unwrap_text(number))
        except Unreadable:
            continue
        readings.append(Scalar(term, unit))
    if not readings:
        raise Unreadable(f"{text!r} is no expression")
    return readings


def _is_counted(shape: Shape) -> bool:
    """Tell whether `shape` is a numeral, as on a clock."""
    return isinstance(shape, Scalar) and isinstance(shape.term, Number)
