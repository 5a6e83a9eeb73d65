import json
import time
from functools import partial

import pytest

from async_opd.core.errors import DataError
from async_opd.roles.verifier.checks import code
from async_opd.roles.verifier.sandbox.program import Program

SUMS = {"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7"]}
ADD = {
    "prompt": 'OFFSET = 0\n\ndef add(a, b):\n    """The sum."""\n',
    "test": (
        "def check(candidate):\n    assert candidate(1, 2) == 3 + OFFSET\n    assert candidate([1],"
        " []) == [1]\n"
    ),
    "entry_point": "add",
}
TRIPLE = {"test_list": ["assert triple(2) == 6", "assert triple('a') == 'aaa'"]}
TWO_SUM = {
    "inputs": [[[2, 7], 9], [[3, 3], 6]],
    "outputs": [[0, 1], [[0, 1]]],
    "fn_name": "two_sum",
}
METHOD = "class Solution:\n    def two_sum(self, numbers, target):\n        return (0, 1)"
PAIR = "class Pair:\n    def __init__(self, a, b):\n        self.a = a\n"


def decide(program: str, tests: dict) -> bool:
    """By the real check, without namespaces where the host has none: what is right does not depend
    on them."""
    start = partial(Program, isolated=False, memory=512 << 20, deadline=time.monotonic() + 20)
    return code.check(program, json.dumps(tests), start)


@pytest.mark.parametrize(
    ("program", "tests"),
    [
        ("a, b = map(int, input().split())\nprint(a + b)", SUMS),
        ("import sys\nprint(sum(map(int, sys.stdin.read().split())), ' \\n')", SUMS),
        ("for _ in range(2): print(input())", {"inputs": [["a", "b"]], "outputs": [["a", "b"]]}),
        ("def add(a, b):\n    return a + b", ADD),
        ("    return a + b", ADD),  # goes on where the prompt ends
        ("triple = lambda x: 3 * x", TRIPLE),
        ("triple = lambda x: 3 * x\nif __name__ == '__main__':\n    input()", TRIPLE),
        ("def sum(a, b): return a + b", {"test_list": ["assert sum(1, 2) == 3"]}),
        (
            "def half(x): return {x: (x / 2, None, b'', 1j)}",
            {"test_list": ["assert half(1) == {1: (.5, None, b'', 1j)}"]},
        ),
        (
            "def f(): return float('nan'), 10**5000",
            {"test_list": ["a, b = f()\nassert a != a and b == 10**5000"]},
        ),
        ("def f(x): return (c for c in x)", {"test_list": ["assert set(f('ab')) == {'a', 'b'}"]}),
        (
            "def f(x): raise ValueError",
            {"test_list": ["try:\n    f(1)\n    assert 0\nexcept ValueError:\n    pass"]},
        ),
        (
            f"{PAIR}def first(p): return p.a",
            {"test_list": ["assert first(p) == 1"], "test_setup_code": "p = Pair(1, 2)"},
        ),
        (
            "def root(x): return x ** .5",
            {"test_list": ["assert math.isclose(root(2), math.sqrt(2))"]},
        ),
        (METHOD, TWO_SUM),
        ("def two_sum(numbers, target): return [0, 1]", TWO_SUM),
        (
            METHOD.replace("numbers, target)", "numbers: List[int], target: Optional[int])"),
            TWO_SUM,
        ),  # as LeetCode has it
        ("print('ok')\nexit()", {"inputs": [""], "outputs": ["ok"], "fn_name": None}),
        ("print(10**5000 % 7, len(str(10**5000)))", {"inputs": [""], "outputs": ["2 5001"]}),
        (
            "print(.1 + .2, end='\\n\\n')\nprint(' 3.0')",
            {"inputs": [""], "outputs": ["0.3\n3.000000"]},
        ),
        (
            (
                "from __future__ import annotations\nfrom dataclasses import"
                " dataclass\n@dataclass\nclass P:\n    a: int\ndef first(x): return P(x).a"
            ),
            {"test_list": ["assert first(1) == 1"]},
        ),
        (
            "def f(x, t): return [v for v in x if type(v) is not t]",
            {"test_list": ["assert f((1, 'a'), str) == [1]"]},
        ),
        ("def queue(x): return x", {"test_list": ["assert queue(1) == 1"]}),  # a module too
        (f"{PAIR}def search(p): return p.a", {"test_list": ["assert search(Pair(1, 2)) == 1"]}),
        ("def Extract(x): return x", {"test_list": ["assert Extract([1]) == [1]"]}),
        ("def f(x): return x ** .5", {"test_list": ["assert isclose(f(2), sqrt(2))"]}),
        ("def f(x): return [x, x]", {"test_list": ["assert Counter(f(1)) == Counter([1, 1])"]}),
    ],
)
def test_a_program_that_passes_all_tests_is_right(program, tests):
    assert decide(program, tests) is True


@pytest.mark.parametrize(
    ("program", "tests"),
    [
        ("print(3.0)", {"inputs": [""], "outputs": ["3"]}),
        (
            "import os\ndef f(x): os._exit(0)",
            {"test_list": ["try:\n    f(1)\nexcept (OSError, ValueError):\n    pass"]},
        ),
        ("print(3)", SUMS),
        ("a, b = map(int, input().split())\nprint(a + b)\nraise ValueError", SUMS),
        ("a, b = map(int, input().split())\nprint(a, b, a + b)", SUMS),
        ("def add(a, b):\n    return 3", ADD),
        ("def subtract(a, b):\n    return a - b", ADD),
        ("def (", ADD),
        ("", TRIPLE),
        ("x = '\ud800\0'", TRIPLE),
        ("def two_sum(numbers, target): return [1, 0]", TWO_SUM),
    ],
)
def test_a_wrong_answer_an_exception_and_no_program_are_wrong(program, tests):
    assert decide(program, tests) is False


FORGERIES = {
    "exits": "import sys\nsys.exit(0)",
    "exits at once": "import os\nos._exit(0)",
    "exits when called": "def add(a, b):\n    raise SystemExit(0)",
    "exits at once when called": "import os\ndef add(a, b):\n    os._exit(0)",
    "prints what a harness may print": (
        "print('OK', 'passed', '{\"value\": true}')\nimport os; os._exit(0)"
    ),
    "redefines check": "def check(candidate): pass\ndef add(a, b): return 0",
    "redefines builtins": (
        "import builtins\nbuiltins.AssertionError = None\ndef add(a, b): return 0"
    ),
    "equals everything": (
        "class Any:\n    def __eq__(self, other): return True\ndef add(a, b): return Any()"
    ),
    "is a number that equals everything": (
        "class Any(int): __eq__ = lambda *a: True\ndef add(a, b): return Any()"
    ),
    "has a class that lies": (
        "class Any:\n    __class__ = int\n    __eq__ = print\ndef add(a, b): return Any()"
    ),
    "passes the tests' helpers": "OFFSET = -3\ndef add(a, b): return 0",
    "answers unasked": (
        "import os\n[os.write(fd, b'{\"value\": 3}\\n' * 9) for fd in (1, 4)]\ndef add(a, b):"
        " return 0"
    ),
    "answers with what is no data": (
        "import os\nos.write(4, b'{\"exit\": 0}\\n' * 9)\ndef add(a, b): return 0"
    ),
    "raises the exit of the test driver": (
        "class SystemExit(BaseException): pass\ndef add(a, b): raise SystemExit"
    ),
    "exits when collected": (
        "import atexit, os\natexit.register(os._exit, 0)\ndef add(a, b): return 0"
    ),
    "looks for the tests": (
        "import gc, sys\ndef add(a, b):\n    seen = [o for o in gc.get_objects() if isinstance(o,"
        " str)] + [str(sys._getframe(1).f_locals)]\n    return 3 if any('candidate(1, 2)' in s for"
        " s in seen) else 0"
    ),
}


@pytest.mark.parametrize("program", FORGERIES.values(), ids=FORGERIES)
def test_no_program_can_say_that_it_is_right(program):
    assert decide(program, ADD) is False


ITERATED = {
    "test_list": [
        "assert all(map(lambda x: f(x) == x + 1, [1, 2]))",
        "assert [*map(f, [])] == [] and not any(map(f, [1]))",
    ]
}


@pytest.mark.parametrize(
    "program",
    [
        "def f(x): raise StopIteration",
        "def f(x): raise StopAsyncIteration",
        "def f(x): raise GeneratorExit",
        "class E(StopIteration): pass\ndef f(x): raise E",
        'import os\ndef f(x):\n    os.write(4, b\'{"raised": "StopIteration"}\\n\')',
        'import os\ndef f(x):\n    os.write(4, b\'{"raised": "SystemExit"}\\n\')',
    ],
)
def test_what_ends_a_loop_does_not_pass_the_tests_of_it(program):
    assert decide(program, ITERATED) is False


@pytest.mark.parametrize(
    ("program", "test"),
    [
        ("def isclose(*a): return True", "assert isclose(f(2), 1.41)"),
        ("def Counter(x): return 0", "assert Counter(f(1)) == Counter([1, 1])"),
        ("def Near(x): return 0", "assert f(2) == Near(1.41)"),
        ("class math:\n    isclose = lambda *a: True", "assert math.isclose(f(2), 1.41)"),
    ],
)
def test_no_program_compares_its_own_answers(program, test):
    assert decide(f"def f(x): return 0\n{program}", {"test_list": [test]}) is False


@pytest.mark.parametrize(
    "test",
    [
        "assert np.isclose(f(2), 1.41)",
        "assert f(2) == pytest.approx(1.41)",
        "assert almost_equal(f(2), 1.41)",
        "assert f(2) == approx(1.41)",
        "assert f(2) == EXPECTED",
    ],
)
def test_tests_that_use_what_they_never_imported_are_refused_by_its_name(test):
    with pytest.raises(DataError, match=r"np|pytest|almost_equal|approx|EXPECTED"):
        code.read_reference(json.dumps({"test_list": [test]}))


def test_a_builtin_of_the_programs_own_does_not_reach_the_tests():
    forged = (
        "def f(x): return 0\ndef set(x): return 0\nclass math:\n    isclose = staticmethod(lambda"
        " *a: True)"
    )
    assert decide(forged, {"test_list": ["assert set(f('ab')) == {'a'}"]}) is False
    assert decide(forged, {"test_list": ["assert math.isclose(f(1), 2)"]}) is False


@pytest.mark.parametrize(
    ("response", "program"),
    [
        ("```python\nx = 1\n```\nthen\n```py\nx = 2\n```\ndone", "x = 2\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("```python\nx = 1\n```\n```json\n{}\n```\nno code", "x = 1\n"),
        ("```Python 3\n  x = 1\n```", "  x = 1\n"),
        ("```python\nx = 1\n```\n```python\nx = 2", "x = 1\n"),
        ("x = 1", "x = 1"),
    ],
)
def test_the_program_is_the_last_closed_block_of_python_or_else_the_response(response, program):
    assert code.last_program(response) == program


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "42",
        "[]",
        "{}",
        '{"inputs": [], "outputs": []}',
        '{"inputs": ["1"], "outputs": []}',
        '{"test_list": []}',
        '{"test_list": "assert True"}',
        '{"test": "", "entry_point": "a b"}',
        '{"entry_point": "f"}',
        '{"inputs": [[1]], "outputs": [1], "fn_name": "os.system"}',
        "[" * 100_000,
    ],
)
def test_tests_that_cannot_be_read_are_an_error_and_not_a_wrong_program(answer):
    with pytest.raises(DataError, match="reference answer"):
        code.check("print(1)", answer, start=None)


@pytest.mark.parametrize(
    ("test", "why"),
    [
        ("assert f(", "'assert f\\(' are no Python: SyntaxError"),
        ("assert f(lambda: 1) == 1", "do not compile, or call with what is no data"),
    ],
)
def test_tests_that_do_not_compile_or_pass_what_is_no_data_are_an_error(test, why):
    with pytest.raises(DataError, match=why):
        decide("def f(x): return 1", {"test_list": [test]})
