r"""Answers made to stop the `math` check, and one that hangs among good ones, on the real pool.

`pytest tests/faults/test_verifier.py -m soak -s` prints what became of each family of 2,000.
"""

import asyncio
import os
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import suppress
from itertools import cycle, islice

import psutil
import pytest

from async_opd.core.wire import Check
from async_opd.roles.verifier.pool import VerifierPool
from async_opd.roles.verifier.process import WorkerProcess

REFERENCE = r"\frac{17}{19}"
SLACK_S = 20.0  # for a kill, on a busy machine
MEMORY_GIB = 2.0


def tower(r: random.Random) -> str:
    return "^{".join(str(r.randint(2, 99)) for _ in range(r.randint(4, 40))) + "}" * 39


def nested(r: random.Random, left: str, right: str, deep: int = 3000) -> str:
    n = r.randint(deep // 10, deep)
    return left * n + "1" + right * n


def digits(r: random.Random, n: int) -> str:
    return str(r.randint(1, 9)) + "".join(r.choices("0123456789", k=n))


def many(r: random.Random, item: Callable[[], object], between: str, most: int = 5000) -> str:
    return between.join(str(item()) for _ in range(r.randint(most // 10, most)))


FAMILIES: dict[str, Callable[[random.Random], str]] = {
    "towers of powers": tower,
    "factorials": lambda r: f"{r.randint(10**5, 10**9)}!" + "!" * r.randint(0, 3),
    "factorials of factorials": lambda r: "(" * 4 + str(r.randint(5, 99)) + "!)" * 4,
    "huge exponents": lambda r: f"{r.randint(2, 9)}^{{{digits(r, r.randint(8, 30))}}}",
    "decimals with exponents": lambda r: rf"{r.random()}e{r.randint(10**6, 10**12)}",
    "times ten to the": lambda r: rf"1.{r.randint(1, 99)} \times 10^{{{r.randint(10**7, 10**12)}}}",
    "many digits": lambda r: digits(r, r.randint(10**4, 10**6)),
    "many decimals": lambda r: "0." + digits(r, r.randint(10**4, 10**6)),
    "braces": lambda r: nested(r, "{", "}"),
    "parentheses": lambda r: nested(r, "(", ")"),
    "left and right": lambda r: nested(r, r"\left(", r"\right)", 1000),
    "fractions": lambda r: nested(r, r"\frac{1}{", "}", 1000),
    "radicals": lambda r: nested(r, r"\sqrt{1+", "}", 1000),
    "unbalanced": lambda r: (
        r.choice(["{", "}", "(", r"\frac{", r"\left[", r"\begin{matrix}"]) * r.randint(100, 5000)
    ),
    "surrogates": lambda r: "".join(
        chr(r.randint(0xD800, 0xDFFF)) for _ in range(r.randint(1, 1000))
    ),
    "odd characters": lambda r: "".join(
        chr(r.randint(1, 0xD7FF)) for _ in range(r.randint(1, 3000))
    ),
    "null bytes": lambda r: "\0".join(digits(r, 3) for _ in range(r.randint(2, 1000))),
    "matrices": lambda r: (
        rf"\begin{{pmatrix}}{many(r, lambda: r.randint(0, 99), ' & ')}\end{{pmatrix}}^{{-1}}"
    ),
    "sets": lambda r: rf"\{{{many(r, lambda: r.randint(0, 10**6), ', ')}\}}",
    "intervals": lambda r: many(
        r, lambda: f"[{r.randint(0, 99)}, {r.randint(100, 10**9)})", r" \cup ", 500
    ),
    "macros": lambda r: r"\def\a{\a\a}" + r"\newcommand{\b}{\b\b}" + r"\a\b" * r.randint(1, 1000),
    "sums": lambda r: (
        rf"\sum_{{n=1}}^{{{r.randint(10**6, 10**12)}}} \frac{{1}}{{n^{{{r.randint(2, 9)}}}+n!}}"
    ),
    "products": lambda r: (
        rf"\prod_{{n=1}}^{{{r.randint(10**5, 10**9)}}} (n^{{{r.randint(2, 99)}}}+1)"
    ),
    "integrals": lambda r: (
        rf"\int_0^{{{r.randint(1, 9)}}} e^{{-x^{{{r.randint(3, 99)}}}}} \sin(x^x) \, dx"
    ),
    "limits": lambda r: rf"\lim_{{x \to \infty}} x^{{x^{{{r.randint(2, 99)}}}}} / \Gamma(x^x)",
    "binomials": lambda r: rf"\binom{{{digits(r, 9)}}}{{{digits(r, 8)}}}",
    "gammas": lambda r: rf"\Gamma({digits(r, r.randint(6, 12))})",
    "trigonometry": lambda r: nested(r, r.choice([r"\sin(", r"\tan(", r"\arccos("]), ")", 300),
    "expansions": lambda r: (
        f"({many(r, lambda: r.choice('abcxyz'), '+', 40)})^{{{r.randint(50, 5000)}}}"
    ),
    "operators": lambda r: (
        r.choice(["+", "-", r"\cdot ", "=", "<", "%", "/", "!"]) * r.randint(100, 5000) + "1"
    ),
    "long sums": lambda r: many(r, lambda: f"x_{{{r.randint(0, 10**6)}}}", "+"),
    "percent and units": lambda r: many(r, lambda: rf"{r.randint(0, 99)}\% \text{{km/h}} \$", " "),
    "radixes": lambda r: many(r, lambda: f"{digits(r, 20)}_{{{r.randint(2, 36)}}}", "+", 500),
    "names": lambda r: "".join(r.choices("abcdefghijklmnopqrstuvwxyz", k=r.randint(10**3, 10**5))),
    "equalities": lambda r: many(r, lambda: f"x^{r.randint(2, 99)}", " = ", 500),
    "boxes": lambda r: r"\boxed{" * r.randint(100, 3000),
    "logarithms": lambda r: rf"\log_{{{r.randint(2, 9)}}}({tower(r)})",
    "modulo": lambda r: rf"{tower(r)} \mod {r.randint(2, 10**9)}",
    "absolute values": lambda r: nested(r, "|", "|", 500),
    "piecewise": lambda r: (
        rf"\begin{{cases}}{many(r, lambda: 'x^2 & x>1', chr(92) * 2, 1000)}\end{{cases}}"
    ),
}


@pytest.fixture
def attack(start_pool, check, workers, monkeypatch):
    """Has `count` hostile answers over all families checked, and asserts what must hold; returns a
    table by family."""
    took, ask = {}, WorkerProcess.ask

    async def timed(worker, asked, limit_s):
        started = time.monotonic()
        verdict = await ask(worker, asked, limit_s)
        took[asked.id] = time.monotonic() - started
        return verdict

    async def run(count: int, timeout_s: float, lanes: int = 2) -> str:
        pool = await start_pool(workers=lanes, timeout_s=timeout_s, memory_gib=MEMORY_GIB)
        rng, found, peak, todo = random.Random(0), defaultdict(list), 0, []
        for family in islice(cycle(rng.sample(list(FAMILIES), len(FAMILIES))), count):
            todo.append((family, check(rf"so \boxed{{{FAMILIES[family](rng)}}}", REFERENCE)))

        async def lane():
            nonlocal peak
            while todo:
                family, hostile = todo.pop()
                found[family].append(await pool.check(hostile))
                with suppress(psutil.NoSuchProcess):
                    peak = max(peak, *(worker.memory_info().rss for worker in workers()), 0)

        await asyncio.gather(*(lane() for _ in range(lanes)))
        verdicts = [verdict for verdicts in found.values() for verdict in verdicts]
        assert len(verdicts) == count
        assert [verdict.id for verdict in verdicts if verdict.correct] == []
        assert max(took.values()) < timeout_s + SLACK_S
        assert peak < MEMORY_GIB * 2**30
        for answer in (2, 3) * lanes:
            assert await decided(pool, check, rf"\boxed{{{answer}}}") is (answer == 2)
        assert len(workers()) == lanes
        return _table(found, took)

    monkeypatch.setattr(WorkerProcess, "ask", timed)
    return run


async def decided(pool: VerifierPool, check: Callable[..., Check], response: str) -> bool:
    """The verdict on an easy response against "2". On a busy machine it may take more than one
    deadline."""
    for _ in range(20):
        verdict = await pool.check(check(response, "2"))
        if verdict.correct is not None:
            return verdict.correct
    raise AssertionError(verdict)


def _table(found: dict, took: dict[str, float]) -> str:
    lines = [
        "| family | answers | wrong | unknown | workers replaced | longest, ms |",
        "|---|---|---|---|---|---|",
    ]
    for family, verdicts in found.items():
        unknown = [verdict for verdict in verdicts if verdict.correct is None]
        replaced = [verdict for verdict in unknown if not verdict.cause.startswith("check raised")]
        longest = max(took[verdict.id] for verdict in verdicts) * 1000
        cells = (
            family,
            len(verdicts),
            len(verdicts) - len(unknown),
            len(unknown),
            len(replaced),
            f"{longest:.0f}",
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


async def test_hostile_answers_of_eight_families_are_decided_in_time_and_none_is_right(attack):
    await attack(8, timeout_s=0.6, lanes=2)


@pytest.mark.soak
@pytest.mark.timeout(3600)
async def test_two_thousand_hostile_answers_are_decided_in_time_and_none_is_right(attack):
    print("\n" + await attack(2000, timeout_s=0.5))


@pytest.mark.parametrize(
    ("good", "hanging"),
    [(3, 12), pytest.param(100, 400, marks=[pytest.mark.soak, pytest.mark.timeout(1800)])],
)
async def test_good_answers_among_hanging_ones_are_all_right(
    start_pool, check, tmp_path, monkeypatch, good, hanging
):
    source = (
        "import time\ndef patient(response, answer):\n    time.sleep(3600 * (response == 'hang'))\n"
        "    return True"
    )
    tmp_path.joinpath("patience.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", f"{os.environ.get('PYTHONPATH', '')}:{tmp_path}")
    pool = await start_pool(workers=4, timeout_s=0.6, check="patience:patient")
    responses = ["2"] * good + ["hang"] * hanging
    random.Random(0).shuffle(responses)
    verdicts = await asyncio.gather(*(pool.check(check(response)) for response in responses))
    outcomes = Counter(zip(responses, (verdict.correct for verdict in verdicts), strict=True))
    undecided = outcomes.pop(("hang", None), 0)  # whose worker had too little of a core
    assert undecided < hanging
    assert outcomes == {("2", True): good, ("hang", False): hanging - undecided}
