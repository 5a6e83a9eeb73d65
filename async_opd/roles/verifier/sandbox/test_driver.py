"""The two halves of a test by calls, each put in front of what runs in a sandbox of its own.
Standard library only.

`serve` holds the program that is tested, `run_tests` its tests. Between them go lines of JSON: what
to call with which values, and the value that came of it. The program meets neither the tests nor
what they expect, and the verdict is the exit status of the tests' process. So there is nothing that
a program could say to be right: it may print, exit, patch and redefine as it likes in a process
that decides nothing, and what it answers are values, never objects with an `==` of their own. Of
what the tests call it defines one function, and classes whose instances are no values: it has no
part in how an answer is compared.
"""

import ast
import builtins
import importlib
import json
import os
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

DATA: dict[str, type] = {
    "list": list,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "dict": dict,
    "bytes": bytes,
}
# By the program, and again where its tests run, which may wait for it; any other ends the program.
RAISED = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError, NameError, OSError),
    *(RuntimeError, TypeError, ValueError),
)
TYPES = {name: kind for name, kind in vars(builtins).items() if isinstance(kind, type)}
UNUSABLE = 3  # exit status of tests that do not compile, or hand the program what cannot be sent
# Who offers what tests may call without an import, as they were written behind one.
OFFERS = (
    *("math", "collections", "itertools", "functools", "heapq", "bisect", "re", "copy", "string"),
    *("operator", "random", "statistics", "fractions", "decimal", "datetime", "cmath", "typing"),
)


def serve(program: str, requests: int, replies: int, prelude: str) -> None:
    """Run `prelude` and `program`, then do what is asked for with what they define."""
    module = sys.modules["program"] = types.ModuleType("program")
    names, kept = module.__dict__, list[object]()
    exec(compile(prelude, "prelude", "exec"), names)
    exec(compile(program, "program", "exec"), names)
    does: dict[str, Callable[..., object]] = {
        "get": names.__getitem__,
        "call": lambda f, args, named: f(*args, **named),
        "list": list,
        "getattr": getattr,
        "setattr": setattr,
    }

    def keep(value: object) -> int:
        kept.append(value)
        return len(kept) - 1

    with open(requests) as asked, open(replies, "w") as answered:
        for line in asked:
            what, *operands = _unpack(json.loads(line), kept.__getitem__)
            try:
                reply = json.dumps({"value": _pack(does[what](*operands), keep)})
            except RAISED as error:
                reply = json.dumps({"raised": type(error).__name__})
            print(reply, file=answered, flush=True)


def run_tests(setup: str, tests: str, entry: str, requests: int, replies: int) -> None:
    """Run `setup`, then `tests`, and fail with them. The function `entry` is the program's, or what
    `tested` says."""
    try:
        code = [compile(source, "tests", "exec") for source in (setup, tests)]
        names, wanted = tested(f"{setup}\n{tests}", entry)
    except (SyntaxError, ValueError):
        os._exit(UNUSABLE)
    asked, answered = os.fdopen(requests, "w"), os.fdopen(replies)

    def ask(*request: object) -> object:
        try:
            print(json.dumps(_pack(request, _id)), file=asked, flush=True)
            reply = json.loads(answered.readline())
        except (OSError, ValueError):
            # It is dead, or says what it was not asked: no error of its own to wait for.
            os._exit(1)
        if "raised" in reply:
            kind = getattr(builtins, reply["raised"], None)
            # None that means something to a loop, as StopIteration does, or that ends this process.
            raise (
                kind
                if isinstance(kind, type) and issubclass(kind, RAISED)
                else RuntimeError(reply["raised"])
            )
        return _unpack(reply["value"], lambda id: _Theirs(ask, id))

    names["__name__"] = "tests"
    function, *classes = [(name, ask("get", name)) for name in wanted] or [("", None)]
    names |= dict([function, *((name, _class(kind)) for name, kind in classes)])
    exec(code[0], names)
    names |= dict([function])  # which `setup` may define, for the program to go on with
    exec(code[1], names)


class _Theirs:
    """Something in the program's process that is no data: a function, or what one made."""

    def __init__(self, ask: Callable[..., Any], id: int) -> None:
        self.__dict__.update(_ask=ask, _id=id)  # not by __setattr__

    def __call__(self, *args: object, **named: object) -> object:
        return self._ask("call", self, args, named)

    def __iter__(self) -> Iterator[object]:
        return iter(self._ask("list", self))

    def __getattr__(self, name: str) -> Any:
        return self._ask("getattr", self, name)

    def __setattr__(self, name: str, value: object) -> None:
        self._ask("setattr", self, name, value)


def _class(kind: object) -> Callable[..., object]:
    """Let the program's `kind` make objects of its own, and nothing that equals a value."""

    def made(*args: object, **named: object) -> object:
        instance = kind(*args, **named)  # type: ignore[operator]
        if not isinstance(instance, _Theirs):
            os._exit(1)
        return instance

    return made


def _id(value: object) -> int:
    if not isinstance(value, _Theirs):
        os._exit(UNUSABLE)
    return value._id


def tested(source: str, entry: str) -> tuple[dict[str, object], list[str]]:
    """What tests use and do not define: names of the standard library, with their values, and those
    of the program: what is tested, `entry` or the one function or class that they call, then
    classes of its arguments. Raises ValueError where others are left: whatever the program took for
    them, it would have a say in its verdict."""
    foreign, called = _foreign(source)
    ours = [] if entry else [name for name in foreign if name in called]
    if len(ours) > 1:
        functions = [name for name in ours if not name[0].isupper()]
        if len(functions) > 1:
            functions = [name for name in functions if _offered(name) is None]
        if len(functions) != 1:
            raise ValueError(f"tests call {' and '.join(ours)}, and define and import none of them")
        classes = (name for name in ours if name[0].isupper() and _offered(name) is None)
        ours = [*functions, *classes]
    names: dict[str, object] = {}
    for name in foreign:
        if name in ours or name == entry or hasattr(builtins, name):
            continue
        if name in sys.stdlib_module_names and name not in called:
            names[name] = importlib.import_module(name)
        else:
            names[name] = _offered(name)
            if names[name] is None:
                raise ValueError(f"tests use {name}, and neither define nor import it")
    return names, [entry] if entry else ours


def _offered(name: str) -> object:
    """What a module of OFFERS has by that name, or None."""
    modules = map(importlib.import_module, OFFERS)
    return next((vars(module)[name] for module in modules if name in vars(module)), None)


def _foreign(source: str) -> tuple[list[str], set[str]]:
    """Names that `source` uses and does not define, and those that it calls. Builtins are no such
    names, unless it uses nothing else."""
    nodes = list(ast.walk(ast.parse(source)))
    used = {node.id for node in nodes if isinstance(node, ast.Name)}
    defined = (
        {n.id for n in nodes if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}
        | {n.name for n in nodes if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
        | {n.arg for n in nodes if isinstance(n, ast.arg)}
        | {(n.asname or n.name).split(".")[0] for n in nodes if isinstance(n, ast.alias)}
        | {n.name for n in nodes if isinstance(n, ast.ExceptHandler) and n.name}
    )
    foreign = sorted(used - defined)
    called = {
        node.func.id
        for node in nodes
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    return [name for name in foreign if not hasattr(builtins, name)] or foreign, called


def _pack(value: Any, keep: Callable[[object], int]) -> object:
    """`value` in JSON; what is no data is kept here, and sent as a number."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    for name, kind in DATA.items():
        if isinstance(value, kind):
            return {
                name: [_pack(part, keep) for part in (value.items() if kind is dict else value)]
            }
    if isinstance(value, type) and TYPES.get(value.__name__) is value:
        return {"builtin": value.__name__}
    return {"object": keep(value)}


def _unpack(value: Any, find: Callable[[int], object]) -> Any:
    """What `_pack` made this of; of a number, what `find` has for it."""
    if not isinstance(value, dict):
        return value
    ((name, parts),) = value.items()
    if name == "object":
        return find(parts)
    if name == "builtin":
        return TYPES[parts]
    return (
        complex(*parts) if name == "complex" else DATA[name](_unpack(part, find) for part in parts)
    )
