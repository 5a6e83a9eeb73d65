"""Rules of the package, read from its source by `ast`.

Imports flow one way, wherever in a file they stand: a unit imports those of earlier lines of ORDER
only. Those of one line never import each other; a config.py is its role's.
"""

import ast
import re
import statistics
import sys
from pathlib import Path

import pytest

import async_opd

ROOT = Path(async_opd.__file__).parent
FILES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in ROOT.rglob("*.py")
}
TREES = {name: ast.parse(text) for name, text in FILES.items()}
ROLES = ["stream", "rollout", "teacher", "verify", "learner", "toy"]
ORDER = [
    ["__init__", "aio", "errors", "say", "metric_names", "process_wide", "run_dir"],
    ["spans"],
    ["wire", "metrics", "mistakes", "checkpoints"],
    ["ports", "collective", "maths", "cpu_engine", "console", "samples"],
    ["causal_lm", "objectives"],
    ROLES,
    ["scoring", "sections", "files"],
    ["config"],
    ["inputs", "explain", "audit", "report", "trace", "card", "crew", "jobs", "placement"],
    ["export", "scale", "progress", "evaluate", "casting", "nodes", "cluster", "plan"],
    ["train", "proxies"],
    ["actors"],
    ["sinks"],
    ["run"],
    ["run_eval"],
    ["commands"],
    ["cli"],
    ["__main__"],
]
RANK = {unit: rank for rank, units in enumerate(ORDER) for unit in units}
CONFINED = {
    "ray": {"actors.py", "nodes.py", "jobs.py"},
    "deepspeed": {"learner/engine.py"},
    "vllm": {"rollout/generator.py", "rollout/weights.py", "learner/publish.py", "teacher/vllm.py"},
}
SMALL = {
    "aio",
    "errors",
    "say",
    "metric_names",
    "process_wide",
    "run_dir",
    "spans",
    "wire",
    "mistakes",
    "metrics",
    "checkpoints",
    "ports",
    "stream",
    "verify",
    "config",
    "evaluate",
    "audit",
    "trace",
    "card",
    "crew",
    "export",
    "scale",
    "progress",
    "train",
    "commands",
    "cli",
}


def imports(name: str) -> set[str]:
    """Full names a file imports, at the top or in a function."""
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {"." * node.level + f"{node.module}.{alias.name}" for alias in node.names}
    return found


def unit(name: str) -> str:
    return name.split("/")[0].removesuffix(".py")


def third_parties(name: str) -> set[str]:
    return {full.split(".")[0] for full in imports(name)} - {"async_opd", *sys.stdlib_module_names}


def nodes(*kinds: type) -> list[tuple[str, ast.AST]]:
    return [
        (name, node)
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, kinds)
    ]


def functions() -> list[tuple[str, int]]:
    """Every function and method with its number of lines."""
    found = nodes(ast.FunctionDef, ast.AsyncFunctionDef)
    return [(f"{name} {node.name}", node.end_lineno - node.lineno + 1) for name, node in found]


def test_every_unit_has_a_rank():
    assert {unit(name) for name in FILES} == set(RANK)


@pytest.mark.parametrize("name", FILES)
def test_imports_flow_one_way(name):
    ours = {full.split(".")[1] for full in imports(name) if full.startswith("async_opd.")} - {
        unit(name)
    }
    assert {other for other in ours if RANK[other] >= RANK[unit(name)]} == set()
    assert {full for full in imports(name) if full.startswith(".")} == set()


@pytest.mark.parametrize("package", CONFINED)
def test_a_big_dependency_stays_in_its_files(package):
    assert {name for name in FILES if package in third_parties(name)} == CONFINED[package]


@pytest.mark.parametrize(
    "name", [name for name in FILES if unit(name) in SMALL or name.endswith("/config.py")]
)
def test_what_small_processes_and_the_command_line_load_needs_msgspec_and_numpy_only(name):
    checks_own = third_parties(name) if name.startswith("verify/checks/") else set()
    assert third_parties(name) - checks_own <= {"msgspec", "numpy"}


def test_a_file_is_one_idea():
    lines = {name: len(text.splitlines()) for name, text in FILES.items()}
    assert {name: count for name, count in lines.items() if count > 300} == {}
    assert statistics.median(lines.values()) <= 150
    assert [name for name in FILES if Path(name).name == "utils.py"] == []


def test_a_function_is_at_most_sixty_lines():
    assert [(name, lines) for name, lines in functions() if lines > 60] == []


def test_the_main_loop_fits_a_screen():
    (lines,) = (lines for name, lines in functions() if name == "train.py run")
    assert lines <= 35


def test_at_most_five_places_catch_everything():
    caught = [
        (name, node.type and ast.unparse(node.type)) for name, node in nodes(ast.ExceptHandler)
    ]
    caught += [
        (name, call) for name, node in nodes(ast.Call) if "suppress(" in (call := ast.unparse(node))
    ]
    assert (
        len(
            [
                name
                for name, types in caught
                if types is None or re.search(r"\b(Base)?Exception\b", types)
            ]
        )
        <= 5
    )


def test_no_message_is_unpickled_and_no_text_is_run():
    unpicklers = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"}
    used = {
        (name, full) for name in FILES for full in imports(name) if full.split(".")[0] in unpicklers
    }
    assert used == {("wire.py", "pickle.PickleBuffer")}  # which unpickles nothing
    calls = [(name, ast.unparse(node.func), node) for name, node in nodes(ast.Call)]
    runs = {name for name, call, _ in calls if call in ("eval", "exec", "compile")}
    assert runs == {"verify/examiner.py"}  # the tests of a reference, in a sandbox
    loads = [(name, node.keywords) for name, call, node in calls if call == "torch.load"]
    safe = ("weights_only", "True")
    assert [
        name for name, given in loads if safe not in {(k.arg, ast.unparse(k.value)) for k in given}
    ] == []


def test_nothing_is_left_for_later():
    assert [name for name, text in FILES.items() if re.search("TODO|FIXME", text)] == []
