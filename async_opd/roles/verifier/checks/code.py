"""A program against tests, in a sandbox.

The program is the last closed block of a response between lines of ```, of Python or of no
language; without such a block it is the whole response. The reference answer is a JSON object that
holds its tests:

    {"inputs": [...], "outputs": [...]}                   APPS: what it reads, what it prints
    {"inputs": [...], "outputs": [...], "fn_name": ...}   APPS: arguments of a function or method
    {"test": ..., "entry_point": ..., "prompt"?: ...}     HumanEval: `test` defines check(candidate)
    {"test_list": [...], "test_setup_code"?: ...}         MBPP: assert statements

Tests by calls are run beside the program, by the module `test_driver`. They see copies of its
values.
"""

import ast
import json
import math
import os
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from async_opd.core.errors import DataError
from async_opd.core.foreign import foreign
from async_opd.roles.verifier.answers.response import after_thoughts
from async_opd.roles.verifier.checks import Late
from async_opd.roles.verifier.config import VerifyConfig
from async_opd.roles.verifier.sandbox import test_driver
from async_opd.roles.verifier.sandbox.program import PROCESSES, Program, pipe, probe

# Of the deadline of a check, for all tests of one response: a limit hit is wrong, a late verdict
# unknown.
SHARE = 0.8
BOUNDED = True
SPARE_BYTES = 65536  # output beyond twice what is expected
BLOCK = re.compile(
    r"^[ \t]*+```[ \t]*+(\S*+)[^\n]*+\n(.*?)^[ \t]*+```[ \t]*+$", re.MULTILINE | re.DOTALL
)
LANGUAGES = {"", "python", "python3", "py"}
TEST_DRIVER = Path(test_driver.__file__).read_text(encoding="utf-8")
# What LeetCode, where such tasks come from, has imported before a solution.
PROVIDED = """
from typing import *
from collections import *
from itertools import *
from functools import *
from math import ceil, floor, gcd, inf, log, sqrt
from heapq import *
from bisect import *
import collections, functools, heapq, itertools, math, random, re, string, sys
"""
EACH_CALL = """
import json
def _each(candidate, cases):
    for arguments, wanted in json.loads(cases):
        result = json.loads(json.dumps(candidate(*arguments)))
        assert result == wanted or [result] == wanted
"""


class InOut(msgspec.Struct):
    """Tests of APPS."""

    inputs: list[Any]
    outputs: list[Any]
    fn_name: str | None = None


class HumanEval(msgspec.Struct):
    """Tests of HumanEval."""

    test: str
    entry_point: str
    prompt: str = ""


class Mbpp(msgspec.Struct):
    """Tests of MBPP."""

    test_list: list[str]
    test_setup_code: str = ""


STYLES = {"inputs": InOut, "entry_point": HumanEval, "test_list": Mbpp}


def make(config: VerifyConfig) -> Callable[..., bool]:
    """Return the check, once a sandbox was tried. Raises ConfigError where there is none to be
    had."""
    limits = {
        "isolated": config.sandbox == "namespaces",
        "memory": int(config.memory_gib * 2**30 / PROCESSES),
    }
    probe(**limits)

    def decide(response: str, answer: str, within_s: float = config.timeout_s) -> bool:
        deadline = time.monotonic() + SHARE * within_s
        right = check(response, answer, partial(Program, **limits, deadline=deadline))
        if not right and within_s < config.timeout_s and time.monotonic() >= deadline:
            raise Late
        return right

    return decide


def check(response: str, answer: str, start: Callable[..., Program]) -> bool:
    """Tell whether the program in `response` passes all tests in `answer`. An exception or a limit
    hit is a test failed.

    Raises DataError if the tests cannot be read.
    """
    tests, code = read_reference(answer), last_program(after_thoughts(response))
    match tests:
        case InOut(fn_name=str(name)) if name:
            code += f"\nif 'Solution' in globals(): {name} = Solution().{name}"
            cases = json.dumps(list(zip(tests.inputs, tests.outputs, strict=True)))
            return _answers(
                code, EACH_CALL, f"_each({name}, {cases!r})", name, start, prelude=PROVIDED
            )
        case InOut():
            return all(
                _prints(code, _text(text), _text(wanted), start)
                for text, wanted in zip(tests.inputs, tests.outputs, strict=True)
            )
        case HumanEval(test, name, prompt):
            return _answers(f"{prompt}\n{code}", prompt, f"{test}\ncheck({name})", name, start)
        case Mbpp(asserts, setup):
            return _answers(code, setup, "\n".join(asserts), "", start)


def last_program(response: str) -> str:
    """Find the last closed block of Python, or take all of `response`."""
    blocks = [code for language, code in BLOCK.findall(response) if language.lower() in LANGUAGES]
    return blocks[-1] if blocks else response


def read_reference(answer: str) -> InOut | HumanEval | Mbpp:
    """Read the tests of a reference answer. Raises DataError."""
    try:
        tree = json.loads(answer)
        tests = msgspec.convert(tree, next(kind for key, kind in STYLES.items() if key in tree))
    except (ValueError, TypeError, RecursionError, StopIteration, msgspec.ValidationError) as error:
        raise DataError(
            f"reference answer {answer[:200]!r} holds no tests of a known style: {error}"
        ) from error
    inputs, outputs = getattr(tests, "inputs", [""]), getattr(tests, "outputs", [""])
    if not inputs or len(inputs) != len(outputs) or getattr(tests, "test_list", [""]) == []:
        raise DataError(
            f"reference answer {answer[:200]!r}: must have a test, and one output for each input"
        )
    name = getattr(tests, "entry_point", "") or getattr(tests, "fn_name", None)
    if name and not name.isidentifier():
        raise DataError(f"reference answer {answer[:200]!r}: {name!r} is no name of a function")
    texts = [getattr(tests, "test", ""), getattr(tests, "test_setup_code", "")]
    for text in (*texts, *getattr(tests, "test_list", [])):
        with foreign(f"reference answer: tests {text[:200]!r} are no Python"):
            ast.parse(text)
    if isinstance(tests, Mbpp):
        with foreign("reference answer"):
            test_driver.tested("\n".join([tests.test_setup_code, *tests.test_list]), "")
    return tests


def _text(lines: Any) -> str:
    """Make one text of what is read or printed; some write it as a list of lines."""
    return "\n".join(map(str, lines)) if isinstance(lines, list) else str(lines)


def _same(output: str, wanted: str) -> bool:
    """Compare word by word in each line that has any; numbers with a point within 1e-6, as APPS
    does."""
    ours, theirs = (
        [line.split() for line in text.splitlines() if line.strip()] for text in (output, wanted)
    )
    return len(ours) == len(theirs) and all(
        len(x) == len(y) and all(map(_equal, x, y)) for x, y in zip(ours, theirs, strict=True)
    )


def _equal(word: str, wanted: str) -> bool:
    if word == wanted or "." not in wanted:
        return word == wanted
    try:
        return math.isclose(float(word), float(wanted), rel_tol=1e-6, abs_tol=1e-6)
    except ValueError:
        return False


def _prints(code: str, text: str, wanted: str, start: Callable[..., Program]) -> bool:
    """Tell whether `code`, which reads `text`, prints what is wanted."""
    limit = 2 * len(wanted.encode()) + SPARE_BYTES
    with os.fdopen(os.memfd_create("input"), "wb", buffering=0) as store, pipe() as (out, printed):
        store.write(text.encode(errors="replace"))
        with (
            open(f"/proc/self/fd/{store.fileno()}", "rb") as stdin,
            open(os.devnull, "wb") as stderr,
            start(code, [stdin.fileno(), printed.fileno(), stderr.fileno()]) as program,
        ):
            printed.close()
            output = program.read(out.fileno(), limit)
            if len(output) > limit or program.wait() != 0:
                return False
    return _same(output.decode(errors="replace"), wanted)


def _answers(
    code: str, setup: str, tests: str, entry: str, start: Callable[..., Program], prelude: str = ""
) -> bool:
    """Tell whether `tests` pass that call what `code` defines."""
    program = f"{TEST_DRIVER}\n\nserve({code!r}, 3, 4, {prelude!r})"
    testing = f"{TEST_DRIVER}\n\nrun_tests({setup!r}, {tests!r}, {entry!r}, 4, 3)"
    with (
        pipe() as (asked, ask),
        pipe() as (answered, reply),
        open(os.devnull, "r+b", buffering=0) as nothing,
    ):
        std = [nothing.fileno()] * 3
        with (
            start(program, [*std, asked.fileno(), reply.fileno()]),
            start(testing, [*std, answered.fileno(), ask.fileno()]) as running,
        ):
            for end in (asked, ask, answered, reply):
                end.close()
            status = running.wait()
    if status == test_driver.UNUSABLE:
        raise DataError(
            f"reference answer: tests {tests[:200]!r} do not compile, or call with what is no data,"
            " or use what they neither define nor import"
        )
    return status == 0
