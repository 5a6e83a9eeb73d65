r"""One spelling for the many of unicode and LaTeX: "２√5 ÷ ¾", "2\,500", `\left( … \right)`."""

import re
import unicodedata

from async_opd.roles.verifier.answers.terms import Unreadable

LONGEST = 2000  # characters of an answer
RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱ", "0123456789+-()ni")
LOWERED = str.maketrans("₀₁₂₃₄₅₆₇₈₉₊₋₍₎", "0123456789+-()")
UP = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱ]+")
DOWN = re.compile("[₀₁₂₃₄₅₆₇₈₉₊₋₍₎]+")
SIGNS = {
    "−": "-", "–": "-", "—": "-", "﹣": "-", "×": r"\times ", "⋅": r"\cdot ", "·": r"\cdot ",
    "∙": r"\cdot ", "÷": "÷", "∕": "/", "⁄": "/", "≤": r"\le ", "≥": r"\ge ", "⩽": r"\le ",
    "⩾": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "∞": r"\infty ", "∪": r"\cup ", "∈": r"\in ",
    "∅": r"\emptyset ", "π": r"\pi ", "±": r"\pm ", "∓": r"\mp ", "…": "...", "⋯": "...",
    "°": r"^\circ ", "ℝ": r"\mathbb{R}", "′": "'", "“": '"', "”": '"', "∠": "",
    "⟨": r"\langle ", "⟩": r"\rangle ", "∖": r"\setminus ", "₹": "₹",
    "∑": r"\sum ", "∫": r"\int ", "∏": r"\prod ",
}  # fmt: skip
GREEK = {
    letter: f"\\{unicodedata.name(letter).split()[-1].lower()} "
    for letter in "αβγδεζηθικμνξρστυφχψω"
} | {"λ": r"\lambda "}
NAMED = str.maketrans(SIGNS | GREEK)

WORDS = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve",
]  # fmt: skip
POWERS = {"thousand": 3, "million": 6, "billion": 9}  # of ten

# Each pattern and what stands for it, in this order.
TIDY = [
    (re.compile(pattern), by)
    for pattern, by in [
        (r"\\(?:left|right|m?left|big|Big|bigg|Bigg)[lrm]?(?![A-Za-z])\s*\.?", ""),
        (r"\\(?:display|text|script)style(?![A-Za-z])|\\limits|\\nolimits|\\phantom\{[^{}]*\}", ""),
        (r"\\!|\\allowbreak|\\nobreak|\\hfill", ""),
        (rf"(?i)^\s*(?:\\text\s*\{{)?\s*({'|'.join(WORDS)})\s*\}}?\s*\.?$",
         lambda match: str(WORDS.index(match[1].lower()))),
        (r"\\(?:label|tag)\*?\{[^{}]*\}", ""),
        (r"(?<!\\)\\[,;:> ]|~|\\q?quad(?![A-Za-z])|\\(?:thin|en|med)space|&nbsp;", " "),
        (r"\{\s*,\s*\}", "{,}"),
        (r"\\(?:text|mathrm|textrm|mbox)\s*\{\s*,?\s*(and|or)\s*\}", r" \1 "),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\over(?![A-Za-z])", r"\\over "),
        (r"\{\s*([^{}]+?)\s*\\over\s+([^{}]+?)\s*\}", r"\\frac{\1}{\2}"),
        (r"\{\s*([^{}]+?)\s*\\choose\s+([^{}]+?)\s*\}", r"\\binom{\1}{\2}"),
        (r"\\text\s*\{\s*(\\?\$|\.)\s*\}", r"\1"),
        (r"\\frac\s*\{\s*\\(?:text|mathrm)\s*\{\s*([A-Za-z]+)\s*\}\s*\}"
         r"\s*\{\s*\\(?:text|mathrm)\s*\{\s*([A-Za-z]+)\s*\}\s*\}", r"\1/\2"),
        (r"(?i)(?:\\text\s*\{\s*)?(?<![A-Za-z])all real(?: number)?s(?:\s*\})?",
         r"\\mathbb{R}"),
        (r"(?i)^\s*(?:option|choice)\s+(?=\(?[A-J]\)?\s*$)", ""),
        *((rf"(?<=[\d.])\s*(\\(?:text|mathrm)\s*\{{)?\s*{word}(?![A-Za-z])",
           rf"\\times 10^{{{power}}}\1") for word, power in POWERS.items()),
        (r"\\mathbb\s*\{?\s*R\s*\}?\s*-\s*(?=\\\{)", r"\\mathbb{R}\\setminus "),
        (r"\\(?:leqslant|leqq|leq|le)(?![A-Za-z])|<=|=<", r"\\le "),
        (r"\\(?:geqslant|geqq|geq|ge)(?![A-Za-z])|>=", r"\\ge "),
        (r"\\(?:neq|ne)(?![A-Za-z])|!=|\\not\s*=", r"\\ne "),
        (r"\\lt(?![A-Za-z])", "<"),
        (r"\\gt(?![A-Za-z])", ">"),
        (r"\\(?:lbrace|\{)", "⦃"),
        (r"\\(?:rbrace|\})", "⦄"),
        (r"\\langle(?![A-Za-z])", "("),
        (r"\\rangle(?![A-Za-z])", ")"),
        (r"\\(?:lbrack)(?![A-Za-z])", "["),
        (r"\\(?:rbrack)(?![A-Za-z])", "]"),
        (r"\\(?:lvert|rvert|vert|mid)(?![A-Za-z])", "|"),
        (r"\\(?:varnothing|emptyset|O)(?![A-Za-z])", r"\\emptyset "),
        (r"\^\s*(?:\{\s*\\(?:circ|degree)\s*\}|\\(?:circ|degree)(?![A-Za-z]))|\\degree",
         r"^{\\circ}"),
        (r"\\(?:vec|hat|bar|overrightarrow|mathbf|mathit|mathcal|boldsymbol|bm|mathsf)"
         r"\s*\{\s*([A-Za-z])\s*\}", r"\1"),
        (r"\\(?:mathbf|mathit|boldsymbol|bm|bf|mathbin|mathord)\s*\{([^{}]*)\}", r"\1"),
        (r"\\(?:text)?color\s*\{[^{}]*\}|\\[hv]space\*?\s*\{[^{}]*\}", ""),
        (r"\\(?:underline|emph|ensuremath|mathstrut)\s*\{([^{}]*)\}", r"\1"),
        (r"\\(?:overline|overrightarrow|overleftrightarrow|widehat)\s*\{\s*([A-Za-z]+)\s*\}",
         r"\1"),
        (r"^\s*\\(?:therefore|implies|Rightarrow|Longrightarrow)(?![A-Za-z])", ""),
        (r"\\operatorname\*?\s*\{([A-Za-z]+)\}", r"\\\1 "),
        (r"\\(?:mathrm|text|textrm)\s*\{\s*([ei])\s*\}", r"\1"),
        (r"\\mathbb\s*\{?\s*R\s*\}?|\\(?:Reals|reals)(?![A-Za-z])", "(-\\\\infty ,\\\\infty )"),
        (r"\\(?:smallsetminus|backslash)(?![A-Za-z])", r"\\setminus "),
        (r"\\approxeq|\\simeq|\\doteq", r"\\approx "),
        (r"\\colon(?![A-Za-z])", ":"),
        (r"\\sqrt\s*(\d)", r"\\sqrt{\1}"),
        (r"\\mathbb\s*\{?\s*([ZNQC])\s*\}?", r"\\all\1 "),
        (r"\\(?:angle|triangle|measuredangle)(?![A-Za-z])", ""),
        (r"(?<![A-Za-z])([ap])\.\s?m(?![A-Za-z])\.?", r"\1m"),
        (r"(?<=\d)(?:\^?\s*\{?\s*\\(?:text|mathrm|textrm)\s*\{\s*(?:st|nd|rd|th)\s*\}\s*\}?"
         r"|\^\s*\{?\s*(?:st|nd|rd|th)\s*\}?|(?:st|rd|th)(?![A-Za-z]))", ""),
        (r"(?<=[\d)])\s*x\s*(?=10\s*\^)", r"\\times "),
        (r"^\s*(?:(?:[Tt]he )?(?:[Ff]inal )?[Aa]nswer(?: is|:)"
         r"|about|approximately|roughly|exactly)\s*",
         ""),
    ]
]  # fmt: skip
WRAPPED = [("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"), ("`", "`")]
MIXED = re.compile(r"(?<![\d.^_])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\d.])")
MIXED_DASH = re.compile(r"^\s*(\d+)-(\d+)/(\d+)\s*$")
GROUPED = re.compile(
    r"(?<![\d.])\d{1,3}(?:(?: \d{3})+|(?:\{,\}\d{3})+|(?:['_]\d{3})+|(?:\.\d{3}){2,})(?![\d'_])"
)
SPACED_DECIMALS = re.compile(r"(?<=\.)\d{3}(?: \d{3})+(?: \d{1,2})?(?!\d)")


def tidy(text: str) -> str:
    """Write `text` as this package reads it: ASCII digits and signs, one command for one thing, no
    sizes, no spaces inside numerals. Raises Unreadable if it is longer than LONGEST."""
    if len(text) > LONGEST:
        raise Unreadable("too long")
    text = "".join(map(_digit, _fractions(text)))
    text = UP.sub(lambda m: f"^{{{m[0].translate(RAISED)}}}", text)
    text = DOWN.sub(lambda m: f"_{{{m[0].translate(LOWERED)}}}", text)
    text = unicodedata.normalize("NFKC", text.translate(NAMED)).translate(NAMED)
    for pattern, by in TIDY:
        text = pattern.sub(by, text)
    text = re.sub(r"\s+", " ", text).strip()
    text = unwrapped(text)
    text = GROUPED.sub(lambda m: re.sub(r"\D", "", m[0]), text)
    text = SPACED_DECIMALS.sub(lambda m: m[0].replace(" ", ""), text).replace("{,}", ",")
    return MIXED_DASH.sub(r"\1\\frac{\2}{\3}", MIXED.sub(r"\1\\frac{\2}{\3}", text))


def unwrapped(text: str) -> str:
    """Take off what marks mathematics, and a full stop or comma at the end."""
    before = ""
    while before != text:
        before = text
        for opening, closing in WRAPPED:
            whole = text.startswith(opening) and text.endswith(closing)
            inner = text[len(opening) : -len(closing)]
            if whole and len(text) > len(opening + closing) and opening not in inner:
                text = inner.strip()
        if not text.endswith(("..", "\\,", "\\;")):
            text = text.rstrip(".,;: \\")
    return text


def _fractions(text: str) -> str:
    r"""Write ¾ as \frac{3}{4}."""
    if text.isascii():
        return text
    written = ""
    for letter in text:
        whole = unicodedata.decomposition(letter).split(" ", 1)
        if whole[0] == "<fraction>":
            top, _, bottom = unicodedata.normalize("NFKC", letter).partition("⁄")
            written += f"\\frac{{{top}}}{{{bottom}}}" if bottom else letter
        else:
            written += letter
    return written


def _digit(letter: str) -> str:
    """Write a decimal digit of any script as one of ASCII."""
    if letter.isascii() or not letter.isdecimal():
        return letter
    return str(unicodedata.decimal(letter))
