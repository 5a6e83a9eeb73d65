r"""Text to an expression: LaTeX (`\frac{3\pi}{4}`) and plain (`3*pi/4`) in one grammar.

sum:      product (("+" | "-") product)*
product:  signed (("*" | "/" | "÷" | nothing) signed)*
power:    atom ("!" | "°" | "%")* ("^" exponent)?
"""

from fractions import Fraction

from async_opd.roles.verifier.answers.terms import (
    Call,
    Choose,
    Constant,
    Name,
    Negative,
    Number,
    Power,
    Product,
    Quotient,
    Root,
    Sum,
    Term,
    Unreadable,
)
from async_opd.roles.verifier.answers.tokens import (
    ARCS,
    CALCULATIONS,
    CONSTANTS,
    FUNCTIONS,
    GREEK,
    numeral,
    tokens,
)

DEEPEST = 40  # brackets, powers or functions in one another
BRACKETS = {"(": ")", "{": "}", "[": "]"}
# Words that no factor begins with.
SIGNS = ("cdot", "times", "div", "ast", "rfloor", "rceil", "choose", "rvert")


def read_expression(text: str) -> Term:
    """Read all of `text` as one expression. Raises Unreadable."""
    parser = _Parser(tokens(text))
    term = parser.sum()
    if parser.place < len(parser.tokens):
        raise Unreadable(f"{parser.tokens[parser.place][1]!r} is not expected")
    return term


class _Parser:
    """Descends through the grammar; `place` is the next token's."""

    def __init__(self, listed: list[tuple[str, str]]):
        self.tokens, self.place = listed, 0
        self.depth = 0
        self.bars = False

    def next_is(self, *wanted: str) -> bool:
        """Tell whether the next token is one of `wanted`."""
        return self.place < len(self.tokens) and self.tokens[self.place][1] in wanted

    def take(self, *wanted: str) -> str:
        """Take the next token, one of `wanted` if any are. Raises Unreadable."""
        if self.place >= len(self.tokens) or (wanted and not self.next_is(*wanted)):
            raise Unreadable(f"{' or '.join(wanted) or 'more'} is expected")
        self.place += 1
        return self.tokens[self.place - 1][1]

    def sum(self) -> Term:
        """Read a sum, up to a token that is none of it."""
        terms = [self.product()]
        while self.next_is("+", "-"):
            sign = self.take()
            term = self.product()
            terms.append(Negative(term) if sign == "-" else term)
        return terms[0] if len(terms) == 1 else Sum(tuple(terms))

    def product(self) -> Term:
        """Read factors and divisors, from left to right."""
        term = self.signed()
        while True:
            if self.next_is("*", "cdot", "times", "ast"):
                self.take()
                term = _times(term, self.signed())
            elif self.next_is("/", "div", "÷"):
                sign = "/" if self.take() == "/" else "÷"
                term = Quotient(term, self.signed(), sign)
            elif self.begins():
                term = self.beside(term)
            else:
                return term

    def beside(self, term: Term) -> Term:
        r"""Read the factor that stands beside `term`; 1\frac{3}{4} is one numeral."""
        mixed = self.next_is("frac")
        factor = self.power()
        return (mixed and _mixed(term, factor)) or _times(term, factor)

    def begins(self) -> bool:
        """Tell whether the next token begins a factor that needs no sign before it."""
        if self.place >= len(self.tokens):
            return False
        kind, token = self.tokens[self.place]
        if kind == "word":
            return token not in SIGNS
        if kind == "number":  # 2 3 is not 6
            return self.place > 0 and self.tokens[self.place - 1][0] != "number"
        return token in ("(", "{", "[", "√", "∛") or (token == "|" and not self.bars)

    def signed(self) -> Term:
        """Read a power with one sign or none; a sign holds for all factors beside it."""
        sign = self.take() if self.next_is("+", "-") else ""
        term = self.power()
        if sign != "-":
            return term
        while self.begins():  # -2x is -(2x)
            term = self.beside(term)
        return Negative(term)

    def power(self) -> Term:
        """Read an atom with what stands behind it and above it."""
        term = self.atom()
        while True:
            if self.next_is("!"):
                self.take()
                if self.next_is("!"):
                    raise Unreadable("a double factorial")
                term = Call("factorial", term)
            elif self.next_is("^"):
                self.take()
                if self._degree():
                    term = Quotient(Product((term, Constant("pi"))), Number(Fraction(180)))
                else:
                    term = Power(term, self.exponent())
            elif self.next_is("%"):
                self.take()
                term = Quotient(term, Number(Fraction(100)))
            else:
                return term

    def _degree(self) -> bool:
        for sign in (["circ"], ["{", "circ", "}"]):
            if [token for _, token in self.tokens[self.place : self.place + len(sign)]] == sign:
                self.place += len(sign)
                return True
        return False

    def exponent(self) -> Term:
        """Read what stands above: one digit or letter without braces in LaTeX, all in plain."""
        negative = self.next_is("-", "+") and self.take() == "-"
        term = self.power()
        return Negative(term) if negative else term

    def group(self) -> Term:
        r"""Read an argument of a command: in braces, or one digit, as in `\frac12`."""
        if self.next_is("{"):
            return self.bracketed("}")
        kind, token = self.tokens[self.place] if self.place < len(self.tokens) else ("", "")
        if kind == "number" and token.isdigit() and len(token) > 1:
            self.tokens[self.place] = (kind, token[1:])
            return numeral(token[0])
        return self.atom()

    def bracketed(self, closing: str) -> Term:
        """Read what stands in brackets, the first of which is next."""
        self.take()
        term = self.sum()
        self.take(closing)
        return term

    def atom(self) -> Term:
        """Read a numeral, a name, a function with its argument, or what stands in brackets."""
        self.depth += 1
        if self.depth > DEEPEST:
            raise Unreadable("too deep")
        term = self._atom()
        self.depth -= 1
        return term

    def _atom(self) -> Term:
        if self.place >= len(self.tokens):
            raise Unreadable("it ends too soon")
        kind, token = self.tokens[self.place]
        if kind == "number":
            self.take()
            return numeral(token)
        if token in ("(", "{", "["):
            return self.bracketed(BRACKETS[token])
        if token == "|" and not self.bars:
            self.bars = True
            term = Call("abs", self.bracketed("|"))
            self.bars = False
            return term
        if token in ("√", "∛"):
            self.take()
            return Root(self.group(), Number(Fraction(3 if token == "∛" else 2)))
        if kind != "word":
            raise Unreadable(f"{token!r} is not expected")
        self.take()
        return self.word(token)

    def word(self, word: str) -> Term:
        """Read what begins by the command or word that was just taken."""
        if word in CALCULATIONS:
            raise Unreadable(f"{word} is not worked out")
        if word == "frac":
            return Quotient(self.group(), self.group())
        if word in ("binom", "dbinom", "tbinom"):
            return Choose(self.group(), self.group())
        if word in ("sqrt", "cbrt"):
            index: Term = Number(Fraction(3 if word == "cbrt" else 2))
            if self.next_is("["):
                index = self.bracketed("]")
            return Root(self.group(), index)
        if word in ("lfloor", "lceil", "lvert"):
            self.place -= 1
            name = {"lfloor": "floor", "lceil": "ceil", "lvert": "abs"}[word]
            return Call(name, self.bracketed(f"r{word[1:]}"))
        if word == "cis":
            return Power(Constant("e"), Product((Constant("i"), self.argument())))
        if word == "exp":
            return Power(Constant("e"), self.argument())
        if word in FUNCTIONS and not (word == "gamma" and not self.next_is("(")):
            return self.function(FUNCTIONS[word])
        if word in CONSTANTS:
            return Constant(CONSTANTS[word])
        if len(word) > 1 and word not in GREEK:
            raise Unreadable(f"{word} is not known")
        return Name(word + self.subscript())

    def subscript(self) -> str:
        """Read what stands below a name, as text."""
        if not self.next_is("_"):
            return ""
        self.take()
        if not self.next_is("{"):
            return f"_{self.take()}"
        self.take()
        text = ""
        while not self.next_is("}"):
            text += self.take()
        self.take()
        return f"_{text}"

    def function(self, name: str) -> Term:
        """Read the base, power and argument of a function."""
        base = exponent = None
        while self.next_is("_", "^"):
            if self.take() == "_":
                base = self.group()
            else:
                exponent = self.exponent()
        if name != "log" and base is not None:
            raise Unreadable(f"{name} with a base")
        if exponent == Negative(Number(Fraction(1))) and f"arc{name}" in ARCS:
            name, exponent = f"a{name}", None
        call = Call(name, self.argument(), base)
        return call if exponent is None else Power(call, exponent)

    def argument(self) -> Term:
        """Read what a function is of: in brackets, or factors up to the next sign or function."""
        if self.next_is("(", "{", "["):
            return self.bracketed(BRACKETS[self.tokens[self.place][1]])
        negative = self.next_is("-") and self.take() == "-"
        term = self.power()
        while self.begins() and self.tokens[self.place][1] not in (*FUNCTIONS, "(", "["):
            term = _times(term, self.power())
        return Negative(term) if negative else term


def _times(term: Term, factor: Term) -> Term:
    factors = term.factors if isinstance(term, Product) else (term,)
    return Product((*factors, factor))


def _mixed(whole: Term, part: Term) -> Number | None:
    """Read 1 3/4, a whole number and a proper fraction behind it, as one numeral."""
    match whole, part:
        case Number(value, digits=0), Quotient(Number(top, digits=0), Number(bottom, digits=0)):
            proper = value.denominator == top.denominator == bottom.denominator == 1
            if proper and value >= 1 and 0 < top < bottom:
                return Number(value + top / bottom)
    return None
