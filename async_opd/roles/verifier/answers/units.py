r"""A number apart from its unit, currency, degrees or percent, as users write them."""

import re

from async_opd.roles.verifier.answers.tokens import CALCULATIONS, FUNCTIONS, GREEK

PERCENT = "%"
DEGREE = "degree"
NO_UNIT = ""  # what says only that something is counted

SAME = {
    "mm": "millimeter millimetre", "cm": "centimeter centimetre", "m": "meter metre",
    "km": "kilometer kilometre kms", "in": "inch inche", "ft": "foot feet", "yd": "yard",
    "mi": "mile", "mg": "milligram", "g": "gram gramme gm", "kg": "kilogram kilo kgs",
    "lb": "pound lbs", "oz": "ounce", "ms": "millisecond", "s": "sec second", "min": "minute mins",
    "h": "hr hour hrs", "day": "days", "week": "weeks", "month": "months", "year": "yr years",
    "l": "L liter litre", "ml": "mL milliliter millilitre", "n": "N newton", "j": "J joule",
    "w": "W watt", "v": "V volt", "a": "ampere amp", "k": "K kelvin", "hz": "Hz hertz",
    "pa": "Pa pascal", "mol": "mole", "ev": "eV electronvolt", "kwh": "kWh", "nm": "nanometer",
    "rad": "radian radians", "mph": "mph", "km/h": "kmh kph kmph", "acre": "acre", "kj": "kJ",
    "$": "dollar usd buck", "¢": "cent", "€": "euro eur", "£": "gbp", "¥": "yen yuan",
    "₹": "rupee", DEGREE: "deg degrees", PERCENT: "percent pct percentage",
    "am": "am", "pm": "pm",
    NO_UNIT: "unit integer number point digit way time solution value",
}  # fmt: skip
CANONICAL = {word: unit for unit, words in SAME.items() for word in (unit, *words.split())}
CURRENCY = re.compile(r"^(-?)\s*(?:(\\\$|\$|€|£|¥|₹|\\pounds|\\euro|USD|Rs\.?)\s*)(-?)(?=[\d.\\])")
CURRENCIES = {r"\$": "$", "USD": "$", "Rs": "₹", "Rs.": "₹", r"\pounds": "£", r"\euro": "€"}
WRAP = re.compile(
    r"\\(?:text|mathrm|textrm|mbox|textit|textbf|rm|mathit|hbox|textnormal)\s*\{([^{}]*)\}"
)
TRAILING_PERCENT = re.compile(r"^(.*?[\d)}\]])\s*\\?%$")
TRAILING_DEGREE = re.compile(r"^(.*?[\d)}\]a-z])\s*\^\{\\circ\}\s*([CF]?)$")
ANGLED = re.compile(r"(?:sin|cos|tan|cot|sec|csc|cis)(?![a-z])")  # of which an angle is taken
TRAILING_SIGN = re.compile(r"^(.*?\d)\s*(\\\$|\$|€|£|¥|₹|¢)$")
POWER = r"(?:\s*\^\s*\{?\s*-?[123]\s*\}?)?"
UNITS = re.compile(
    r"^(?P<number>(?:.*\d)?pi|.*?[\d)}\]!|]|.*?\\pi|.*?[\d)}\]]\s*[a-z])\s*"
    rf"(?P<units>(?:/\s*)?(?<![\\A-Za-z])[A-Za-z]+\.?{POWER}"
    rf"(?:\s*(?:/|\\cdot|\*|\s|-)\s*[A-Za-z]+\.?{POWER})*)$"
)
WORDS = re.compile(rf"/|[A-Za-z]+{POWER}")
SQUARED = {"square": "^2", "squared": "^2", "sq": "^2", "cubic": "^3", "cubed": "^3", "cu": "^3"}
LETTERS = set("msghlLNJWVK")  # alone, a unit after a number: 5 m
# Behind a number, that make another of it.
COUNTS = set(
    """plus minus times over squared cubed factorial choose not half halves third thirds fourths
    fifths sixths eighths tenths dozen hundred hundreds""".split()  # noqa: SIM905
)


def unwrap_text(text: str) -> str:
    r"""Take `\text{…}` and its like from around what they hold."""
    before = ""
    while before != text:
        before = text
        text = WRAP.sub(lambda m: f" {m[1].strip()} ", text)
    return re.sub(r"\s+", " ", text).strip()


def split_unit(text: str) -> list[tuple[str, str]]:
    """List the readings of `text` as a number and its unit, "" where it has none; first the one
    without."""
    readings = [(text, NO_UNIT)]
    if money := CURRENCY.match(text):
        sign = money[1] or money[3]
        currency = CURRENCIES.get(money[2], money[2])
        number = sign + text[money.end() :]
        return [(number, currency), *((n, currency) for n, _ in split_unit(number)[1:])]
    if percent := TRAILING_PERCENT.match(text):
        return [(percent[1], PERCENT)]
    if degree := TRAILING_DEGREE.match(unwrap_text(text)):
        number = degree[1].replace(r"^{\circ}", "")  # of 180° - 45° both are
        return readings if ANGLED.search(text) else [(number, DEGREE + degree[2])]
    if sign := TRAILING_SIGN.match(text):
        return [(sign[1], CURRENCIES.get(sign[2], sign[2]))]
    unwrapped = unwrap_text(text)
    if match := UNITS.match(unwrapped):
        unit = _unit(match["units"], wrapped=unwrapped != text)
        if unit is not None:
            number = match["number"].strip()
            return [*readings, (number, unit)]
    return readings


def _unit(text: str, wrapped: bool) -> str | None:
    """Spell a unit in one way: "square centimeters" as cm^2. None where it is none."""
    written, squared = "", ""
    words = WORDS.findall(text.replace(" per ", "/"))
    for word in words:
        name, _, power = re.sub(r"[\s{}]", "", word).partition("^")
        if word == "/":
            written += "/"
        elif name in ("of", "an"):
            continue
        elif not written and name in ("squared", "cubed"):
            return None
        elif name.lower() in SQUARED:
            power = SQUARED[name.lower()]
            if written and not written.endswith("/"):
                written += power
            else:
                squared = power
        elif (unit := _one(name, wrapped)) is None:
            return None
        else:
            separator = " " if written and not written.endswith("/") else ""
            written += separator + unit + (f"^{power}" if power else squared)
            squared = ""
    return NO_UNIT if written.strip("^23 ") == "" else written.strip()


def _one(name: str, wrapped: bool) -> str | None:
    if name.lower() in COUNTS:
        return None
    if name in FUNCTIONS or name in CALCULATIONS or name in GREEK or name in ("sqrt", "pi", "exp"):
        return CANONICAL.get(name) if wrapped or name == "min" else None
    for form in (name, name.lower(), name.rstrip("."), name.lower().removesuffix("s")):
        if form in CANONICAL and (len(form) > 1 or wrapped or form in LETTERS):
            return CANONICAL[form]
    if len(name) >= 3 or wrapped:
        return name.lower().removesuffix("s")
    return None
