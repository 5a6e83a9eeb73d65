r"""Text to tokens: numerals, words (commands of LaTeX, functions, constants, letters) and signs."""

import re
from fractions import Fraction

from async_opd.roles.verifier.answers.terms import Number, Unreadable

MOST_DIGITS = 4000
MOST_TOKENS = 300  # of an expression; no tree is deeper
LARGEST_POWER = 5000  # of ten, in 1e5000

ARCS = {f"{arc}{name}": f"a{name}" for name in ("sin", "cos", "tan", "cot", "sec", "csc", "sinh",
        "cosh", "tanh") for arc in ("arc", "ar", "a")}  # fmt: skip
FUNCTIONS = {
    **ARCS,
    **{name: name for name in ("sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh")},
    **{name: name for name in ("log", "ln", "lg", "abs", "floor", "ceil", "gamma")},
    "tg": "tan",
    "ctg": "cot",
    "arctg": "atan",
}
CONSTANTS = {"pi": "pi", "infty": "oo", "infinity": "oo", "inf": "oo", "oo": "oo", "e": "e",
             "i": "i", "imath": "i", "E": "e", "I": "i"}  # fmt: skip
GREEK = set(
    """alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi
    rho sigma tau upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Sigma Phi Psi Omega
    ell hbar allZ allN allQ allC""".split()  # noqa: SIM905
)
# Their value is asked, so they are no answer; of them, math-verify reads a reference.
CALCULATIONS = set(
    """int iint oint sum prod lim limsup liminf det gcd lcm max min mod bmod pmod sup deg partial
    nabla arg tr rank""".split()  # noqa: SIM905
)
WORDS = (*FUNCTIONS, *CALCULATIONS, "sqrt", "cbrt", "exp", "cis", "pi", "infinity", "infty", "oo")
WORD = re.compile("|".join([*sorted(WORDS, key=len, reverse=True), "[A-Za-z]"]))
TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:\d+(?:\.\d*)?|\.\d+)"
    r"(?:\\overline\{\d+\}|\\bar\{\d+\}|\\dot\{?\d\}?(?:\d*\\dot\{?\d\}?)?"
    r"|\(\d+\)(?=$|\s*[^\w({\s])"
    r"|(?:\.\.+|\\[lc]?dots)|[eE][+-]?\d+(?![\w^]))?)"
    r"|(?P<command>\\[A-Za-z]+)|(?P<word>[A-Za-z]+)|(?P<sign>\*\*|\S))"
)


def tokens(text: str) -> list[tuple[str, str]]:
    """Cut `text` into pairs of kind and token. Raises Unreadable."""
    listed: list[tuple[str, str]] = []
    for match in TOKEN.finditer(text):
        if len(listed) > MOST_TOKENS:
            raise Unreadable("too many tokens")
        kind, token = match.lastgroup or "", match[match.lastgroup or 0]
        if kind == "command":
            listed.append(("word", token[1:]))
        elif kind == "word" and (token in GREEK or token in CONSTANTS):
            listed.append(("word", token))
        elif kind == "word":
            listed += [("word", word) for word in WORD.findall(token)]
        else:
            listed.append((kind, "^" if token == "**" else token))
    return listed


def numeral(text: str) -> Number:
    """Read a numeral, also one in scientific notation or with digits that repeat."""
    digits = re.match(r"\d*\.?\d*", text)
    plain, rest = (digits[0], text[digits.end() :]) if digits else ("", text)
    if len(text) > MOST_DIGITS:
        raise Unreadable("too long a number")
    if re.match(r"\.\.|\\[lc]?dots", rest) and "." not in plain:
        raise Unreadable("dots after a whole number")
    if plain.endswith(".") and rest.startswith("."):
        raise Unreadable("dots")
    whole, _, decimals = plain.partition(".")
    exponent = int(rest[1:]) if rest[:1] in ("e", "E") else 0
    if abs(exponent) > LARGEST_POWER:
        raise Unreadable("too large an exponent")
    value = Fraction(int(f"{whole}{decimals}" or "0"), 10 ** len(decimals))
    if rest and rest[0] in "\\(." and (repeated := _repeated(decimals, rest)):
        plain_decimals, block = repeated
        unit = Fraction(1, 10 ** len(plain_decimals))
        value = Fraction(int(f"{whole or 0}{plain_decimals}")) * unit
        return Number(value + Fraction(int(block), 10 ** len(block) - 1) * unit)
    if not decimals and not exponent:
        return Number(value)
    scale = Fraction(10) ** exponent
    significant = len(f"{whole}{decimals}".lstrip("0"))
    step = scale / 10 ** len(decimals)
    return Number(value * scale, step if decimals else Fraction(0), significant)


def _repeated(decimals: str, rest: str) -> tuple[str, str] | None:
    """Split the digits after the point into those before the block that repeats, and the block."""
    if rest.startswith((".", "\\ldots", "\\cdots", "\\dots")):
        for length in range(1, len(decimals) // 2 + 1):
            block = decimals[-length:]
            least = 3 if length == 1 else 2
            if decimals.endswith(block * least) or decimals == block * 2:
                while decimals.endswith(block):
                    decimals = decimals[:-length]
                return decimals, block
        return None
    block = "".join(re.findall(r"\d+", rest))
    return decimals, block
