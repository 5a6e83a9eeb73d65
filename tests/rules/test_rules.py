"""Rules of the package, read from its source by `ast`.

Imports flow one way, wherever in a file they stand: a unit imports those of earlier lines of ORDER
only. Those of one line never import each other; a config.py is its role's.
"""

import ast
import re
import statistics
import sys
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import async_opd
from async_opd.core import run_dir

ROOT = Path(async_opd.__file__).parent
FILES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in ROOT.rglob("*.py")
}
TREES = {name: ast.parse(text) for name, text in FILES.items()}
# What stands later may import what stands earlier, never the other way round; folders of one line
# know nothing of each other. `config` knows each role by its config.py alone, and no other file of
# `roles` knows `config`.
ORDER = [
    ["core"],
    ["maths", "toy"],
    ["objectives"],
    ["roles"],
    ["config"],
    ["telemetry"],
    ["driver", "runtime"],
    ["launch"],
    ["evaluation", "tools"],
    ["cli"],
]
RANK = {folder: rank for rank, folders in enumerate(ORDER) for folder in folders}
ENTRIES = {"__init__.py", "__main__.py", *RANK}
CONFINED = {
    "ray": {
        "runtime/actors.py",
        "runtime/cluster.py",
        "runtime/nodes.py",
        "runtime/jobs.py",
        "runtime/prometheus.py",
    },
    "deepspeed": {"roles/learner/engine.py"},
    "vllm": {
        "roles/models/vllm_columns.py",  # a class of its front end's, for generators and teachers
        "roles/rollout/engine_args.py",
        "roles/rollout/generator.py",
        "roles/rollout/requests.py",
        "roles/weight_sync/adapter.py",
        "roles/weight_sync/receiver.py",
        "roles/weight_sync/nccl.py",
        "roles/weight_sync/reload.py",
        "roles/weight_sync/sender.py",
        "roles/weight_sync/vllm_updates.py",
        "roles/teacher/vllm_teacher.py",
    },
}
SMALL = (
    "core/",
    "config/",
    "driver/",
    "evaluation/",
    "cli/",
    "roles/verifier/",
    "telemetry/metrics.py",
    "telemetry/metric_names.py",
    "telemetry/spans.py",
    "tools/audit/",
    "tools/export/",
    "tools/trace/",
)


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


def test_the_package_has_these_entries():
    assert {name.split("/")[0] for name in FILES} == ENTRIES
    assert len(ENTRIES) <= 15


@pytest.mark.parametrize("name", [name for name in FILES if "/" in name])
def test_imports_flow_one_way(name):
    ours = {full.split(".")[1] for full in imports(name) if full.startswith("async_opd.")}
    others = ours - {unit(name)}
    assert {other for other in others if RANK[other] >= RANK[unit(name)]} == set()
    assert {full for full in imports(name) if full.startswith(".")} == set()


def test_no_file_needs_one_that_needs_it():
    modules = {
        name.removesuffix(".py").removesuffix("/__init__").replace("/", "."): name for name in FILES
    }

    def needs(name: str) -> set[str]:
        inside = {full.removeprefix("async_opd.") for full in imports(name)}
        return {modules.get(full) or modules.get(full.rpartition(".")[0], name) for full in inside}

    sorter = TopologicalSorter({name: needs(name) - {name} for name in FILES})
    sorter.prepare()  # raises CycleError, with the circle


def test_config_knows_a_role_by_its_settings_alone():
    known = {full for name in FILES if name.startswith("config/") for full in imports(name)}
    roles = {full for full in known if full.startswith("async_opd.roles.")}
    assert {full for full in roles if full.split(".")[3] != "config"} == {
        "async_opd.roles.verifier.checks.kinds",
        "async_opd.roles.verifier.checks.known",
    }


@pytest.mark.parametrize("package", CONFINED)
def test_a_big_dependency_stays_in_its_files(package):
    assert {name for name in FILES if package in third_parties(name)} == CONFINED[package]


@pytest.mark.parametrize(
    "name", [name for name in FILES if name.startswith(SMALL) or name.endswith("/config.py")]
)
def test_what_small_processes_and_the_command_line_load_needs_msgspec_and_numpy_only(name):
    in_workers = ("roles/verifier/checks/", "roles/verifier/answers/")
    checks_own = third_parties(name) if name.startswith(in_workers) else set()
    assert third_parties(name) - checks_own <= {"msgspec", "numpy"}


def test_a_file_is_one_idea():
    lines = {name: len(text.splitlines()) for name, text in FILES.items()}
    assert {name: count for name, count in lines.items() if count > 300} == {}
    assert statistics.median(lines.values()) <= 150
    assert [name for name in FILES if Path(name).name == "utils.py"] == []


def test_a_line_is_at_most_a_hundred_columns():
    wide = [
        name for name, text in FILES.items() if max(map(len, text.splitlines()), default=0) > 100
    ]
    assert wide == []


def test_a_function_is_at_most_sixty_lines():
    assert [(name, lines) for name, lines in functions() if lines > 60] == []


def test_a_function_has_at_most_eight_parameters():
    def parameters(node: ast.FunctionDef) -> int:
        args = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        return len([arg for arg in args if arg.arg not in ("self", "cls")])

    found = nodes(ast.FunctionDef, ast.AsyncFunctionDef)
    ours = [(name, node) for name, node in found if node.name not in ("forward", "backward")]
    # autograd's own aside
    assert [(name, node.name) for name, node in ours if parameters(node) > 8] == []


def test_a_statement_assigns_one_thing_or_a_pair():
    packed = [
        f"{name}:{node.lineno}"
        for name, node in nodes(ast.Assign)
        if isinstance(node.value, ast.Tuple)
        and any(isinstance(t, ast.Tuple) and len(t.elts) > 2 for t in node.targets)
    ]
    assert packed == []


def test_a_name_says_what_it_names():
    said_nothing = {"found", "at", "own", "given", "said", "told"}
    named = [
        (name, getattr(node, "id", None) or getattr(node, "arg", None) or getattr(node, "name", ""))
        for name, node in nodes(ast.Name, ast.arg, ast.FunctionDef, ast.AsyncFunctionDef)
        if not isinstance(getattr(node, "ctx", None), ast.Load)
    ]
    assert [(name, word) for name, word in named if word in said_nothing] == []


def test_the_teachers_own_answers_are_known_in_at_most_ten_files():
    known = {name for name, text in FILES.items() if re.search(r"\bfrom_teacher\b|taught", text)}
    assert len(known) <= 10, sorted(known)


def test_the_main_loop_fits_a_screen():
    (lines,) = (lines for name, lines in functions() if name == "driver/train_loop.py run")
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
    assert used == {("core/message.py", "pickle.PickleBuffer")}  # which unpickles nothing
    calls = [(name, ast.unparse(node.func), node) for name, node in nodes(ast.Call)]
    runs = {name for name, call, _ in calls if call in ("eval", "exec", "compile")}
    assert runs == {
        "roles/verifier/sandbox/test_driver.py"
    }  # the tests of a reference, in a sandbox
    loads = [(name, node.keywords) for name, call, node in calls if call == "torch.load"]
    safe = ("weights_only", "True")
    assert [
        name for name, given in loads if safe not in {(k.arg, ast.unparse(k.value)) for k in given}
    ] == []


def test_the_names_of_a_run_directory_stand_in_one_file():
    names = {value for value in vars(run_dir).values() if f"{value}".endswith((".json", ".jsonl"))}
    named = [
        (name, node.value)
        for name, node in nodes(ast.Constant)
        if node.value in names - {run_dir.CONFIG} and name != "core/run_dir.py"  # models have one
    ]
    assert len(names) > 8
    assert named == []


def test_the_type_checker_is_relaxed_only_where_a_library_without_types_is_imported():
    for name, text in FILES.items():
        rules = re.findall(r"(\w+)=", " ".join(re.findall("# pyright: (report.*)", text)))
        assert all(rule.startswith(("reportUnknown", "reportMissingTypeStubs")) for rule in rules)
        untyped = third_parties(name) & {"torch", "ray", "vllm"}
        assert not rules or untyped or "async_opd.maths.Tensor" in imports(name)  # which is torch's


def test_nothing_is_left_for_later():
    assert [name for name, text in FILES.items() if re.search("TODO|FIXME", text)] == []


def test_no_two_files_of_tests_are_one_module():
    """One outside of a package is known by its name alone: of two pytest collects only the
    first."""
    files = Path(__file__).parents[1].rglob("test_*.py")
    alone = Counter(file.name for file in files if not (file.parent / "__init__.py").exists())
    assert [name for name, count in alone.items() if count > 1] == []
