r"""Column addition written out step by step.

The prompt `826+957=` is answered by one line per column, units first, each `digit+digit+carry=sum`
with a two-digit sum, then by the boxed answer:

    6+7+0=13
    2+5+1=08
    8+9+0=17
    \boxed{1783}
"""

import json
import zlib
from functools import cache
from pathlib import Path
from random import Random

ALPHABET = "0123456789+=\n\\boxed{}"
MAX_PROMPT = 8  # characters, and so tokens
MAX_RESPONSE = 41  # tokens: 40 characters and the end of text
TRAIN_ROWS = 20_480
HELDOUT_ROWS = 512

Problem = tuple[int, int]


def is_heldout(problem: Problem) -> bool:
    """Hold out one pair of operands in sixteen. `a+b` and `b+a` are on the same side."""
    low, high = sorted(problem)
    return zlib.crc32(f"{low}+{high}".encode()) % 16 == 0


def draw(rng: Random, heldout: bool = False) -> Problem:
    """Draw one problem of the wanted split: two operands of two or three digits, each length as
    likely."""
    while True:
        a, b = (rng.randrange(10 ** (n - 1), 10**n) for n in rng.choices((2, 3), k=2))
        if is_heldout((a, b)) == heldout:
            return a, b


def prompt(problem: Problem) -> str:
    return f"{problem[0]}+{problem[1]}="


def answer(problem: Problem) -> str:
    return str(sum(problem))


def response(problem: Problem) -> str:
    """Work out the response, without the end of text: what `next_char` says, a character at a
    time."""
    a, b = (str(operand)[::-1] for operand in problem)
    lines, carry = [], 0
    for place in range(max(len(a), len(b))):
        first, second = _digit(a, place), _digit(b, place)
        total = int(first) + int(second) + carry
        lines.append(f"{first}+{second}+{carry}={total:02d}")
        carry = total // 10
    return "\n".join(["", *lines, f"\\boxed{{{sum(problem)}}}"])


def next_char(problem: Problem, written: str) -> str:
    """Choose what belongs after `written`, any text at all, right or wrong; "" is the end of text.

    Operand digits come from the problem. Carries, sums and the boxed answer come from what is
    really written, so one slip is never undone and never contradicted: the rest is right given the
    slip.
    """
    _, *lines = written.split("\n")
    columns = len(str(max(problem)))
    if len(lines) > columns + 1:
        return ""
    if not lines:
        return "\n"
    *done, line = lines
    if len(done) == columns:
        total = _digit(done[-1], 6) + "".join(_digit(column, 7) for column in reversed(done))
        return f"\\boxed{{{int(total)}}}"[len(line) :][:1]
    a, b = (str(operand)[::-1] for operand in problem)
    carry = _digit(done[-1], 6) if done else "0"
    total = sum(int(_digit(line, place)) for place in (0, 2, 4))
    column = f"{_digit(a, len(done))}+{_digit(b, len(done))}+{carry}={total:02d}\n"
    return column[min(len(line), 8)]


def _digit(text: str, place: int) -> str:
    """Pick the digit at `place` of `text`, "0" where there is none."""
    char = text[place : place + 1]
    return char if char and char in "0123456789" else "0"


def dataset(heldout: bool) -> list[Problem]:
    """List the train or the held-out problems, no problem twice, always the same."""
    rng = Random(f"heldout {heldout}")
    problems: dict[Problem, None] = {}
    while len(problems) < (HELDOUT_ROWS if heldout else TRAIN_ROWS):
        problems[draw(rng, heldout)] = None
    return list(problems)


def write_dataset(folder: Path) -> None:
    """Write `train.jsonl` and `heldout.jsonl`: rows of id, prompt, answer and solution, always the
    same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("train", "heldout"):
        (folder / f"{name}.jsonl").write_text(_rows(name), encoding="utf-8")


@cache  # a run asks for both sets, each time for both
def _rows(name: str) -> str:
    rows = (
        {
            "id": f"{name}-{index:05d}",
            "prompt": prompt(problem),
            "answer": answer(problem),
            "solution": response(problem),
        }
        for index, problem in enumerate(dataset(heldout=name == "heldout"))
    )
    return "".join(f"{json.dumps(row)}\n" for row in rows)
