"""Whatever stands in a config, in an override, in a file of a run directory or among the words of a
command: one line and a status that says whose fault it is, or success; never a trace, and nothing
left behind."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from async_opd.cli.demo import CONFIG as DEMO
from async_opd.cli.main import COMMANDS, main
from async_opd.config.evaluation import EvalRun
from async_opd.config.load import load, read_toml
from async_opd.config.schema import Config
from async_opd.config.validate import refuse_mistakes
from async_opd.core.errors import AsyncOpdError, ConfigError
from tests.cli.finished_run import finished_run


def bounded(examples: int) -> Callable:
    """The same so many examples each time."""
    return settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


NUMBERS = [0, -1, 2**31, 2**63, 10**400, 0.5, -0.0, 1e300, float("nan"), float("inf"), True, False]
TEXTS = ["", "a", "\0", "a\nb", "\x1b[31m", "\udcff", "é" * 300, "/dev/full", "{}", "nan", "1e400"]
SCALARS = st.sampled_from([*NUMBERS, *TEXTS, None]) | st.integers() | st.floats() | st.text()
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


def deep(levels: int) -> list:
    value: list = []
    for _ in range(levels):
        value = [value]
    return value


def keys(kind: type[msgspec.Struct], path: str = "") -> Iterator[str]:
    """Every setting of a section and of those in it, and the sections."""
    for field in msgspec.structs.fields(kind):
        key = f"{path}{field.encode_name}"
        yield key
        for each in getattr(field.type, "__args__", (field.type,)):
            if isinstance(each, type) and issubclass(each, msgspec.Struct):
                yield from keys(each, f"{key}.")
                tag = each.__struct_config__.tag_field
                if tag:
                    yield f"{key}.{tag}"


def put(tree: dict, key: str, value: object) -> None:
    *sections, leaf = key.split(".")
    for section in sections:
        if not isinstance(tree.get(section), dict):
            tree[section] = {}
        tree = tree[section]
    tree[leaf] = value


@bounded(50)
@given(data=st.data())
def test_a_tree_of_settings_is_a_config_or_a_line(data):
    kind = data.draw(st.sampled_from([Config, EvalRun]))
    tree = read_toml(DEMO) if kind is Config else {"student": {"model": "a"}, "data": {"path": "b"}}
    known = sorted(set(keys(kind)))
    for key in data.draw(st.lists(st.sampled_from(known), min_size=1, max_size=2)):
        put(tree, key, data.draw(VALUES))
    try:
        refuse_mistakes(tree, kind)
        json.dumps(msgspec.to_builtins(msgspec.convert(tree, kind)), allow_nan=False).encode()
    except (ConfigError, msgspec.ValidationError):
        return


def test_settings_that_are_too_deep_are_refused():
    for value in (deep(10**5), {"a": deep(10**5)}):
        with pytest.raises(ConfigError, match=r"deep: must be <= \d+$"):
            refuse_mistakes({**read_toml(DEMO), "rollout": value}, Config)


@bounded(50)
@given(
    key=st.sampled_from(sorted(set(keys(Config)))) | st.text(max_size=8),
    value=VALUES.map(lambda value: json.dumps(value, ensure_ascii=False))
    | st.text(alphabet="[]{}='\"\n#.,_-+exob0129aftinruls:TZ \0\udcff", max_size=30)
    | st.sampled_from(
        ["9" * 5000, "0x" + "f" * 5000, "[" * 5000, "a." * 5000 + "b=1", "{a=1}\nb=2"]
    ),
)
def test_an_override_is_a_config_or_a_line(key, value):
    try:
        load(DEMO, [f"{key}={value}"])
    except AsyncOpdError as e:
        assert e.exit_status == 2, e


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Iterator[Path]:
    """A finished run in the working directory `folder`, of which every reader makes something."""
    folder = tmp_path_factory.mktemp("fuzz")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("demo.toml").write_text(DEMO.read_text())
        yield finished_run(folder / "run")


@pytest.fixture
def ends(capfd) -> Callable[..., int]:
    """Runs a command line, which must end by a status that is documented, with one line where it
    says no; gives the status."""

    def run(*words: str) -> int:
        try:
            status = main(list(words))
        except SystemExit as e:
            status = e.code
        out, err = capfd.readouterr()
        assert status in (0, 1, 2), (words, status, out, err)
        assert "Traceback" not in out + err
        if status == 2:
            lines = err.splitlines()
            assert out == "" and len(lines) == 1 and lines[0].startswith("async-opd: "), (
                words,
                err,
            )
        return status

    return run


READERS = {
    "audit": ["audit", "run"],
    "report": ["report", "run", "-o", "out"],
    "trace": ["trace", "run", "-o", "out"],
    "export": ["export", "run", "-o", "out"],
    "plan": ["plan", "demo.toml", "--offline", "--like", "run"],
}
READ = [  # files, and by whom
    *((file, ("audit",)) for file in ("ledger.jsonl", "checkpoints/000006/run.json")),
    *((file, ("report",)) for file in ("summary.json", "environment.json", "samples.jsonl")),
    *((file, ("report", "trace")) for file in ("events.jsonl", "ledger.jsonl")),
    *((file, ("trace",)) for file in ("spans.jsonl", "spans.earlier.jsonl")),
    *((file, ("export",)) for file in ("summary.json", "environment.json", "metrics.jsonl")),
    ("metrics.jsonl", ("audit", "report", "plan")),
    ("config.json", ("audit", "report", "trace", "export", "plan")),
    ("checkpoints/000006/manifest.json", ("export",)),
]


def test_every_reader_of_the_whole_run_succeeds(whole, ends):
    for words in READERS.values():
        assert ends(*words) == 0
        forget()


def forget() -> None:
    """Remove what a reader has written."""
    path = Path("out")
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def places(tree: object, path: tuple = ()) -> Iterator[tuple]:
    """Every place in a tree of JSON."""
    yield path
    children = (
        tree.items()
        if isinstance(tree, dict)
        else enumerate(tree)
        if isinstance(tree, list)
        else ()
    )
    for key, value in children:
        yield from places(value, (*path, key))


def replaced(tree: Any, path: tuple, value: object) -> Any:
    """`tree` with another `value` at that place; without the key where the value is MISSING."""
    if not path:
        return value
    copy = tree.copy()
    if value is MISSING and len(path) == 1:
        del copy[path[0]]
    else:
        copy[path[0]] = replaced(tree[path[0]], path[1:], value)
    return copy


MISSING = object()
RAW = [
    b"",
    b"\n",
    b"\0\xff\xfe",
    b"[]",
    b"null\n",
    b"[" * 10**5,
    b"[" * 10**5 + b"\n",
    b'{"step": 1' + b"0" * 5000 + b"}\n",
    b"\xef\xbb\xbf{}\n",
    '{"a": 1}\n'.encode("utf-16"),
    b"{" + b" " * 10**6,
]


@st.composite
def contents(draw: st.DrawFn, file: Path) -> bytes:
    """The bytes of a file of a run, with a mistake in it."""
    if draw(st.integers(0, 5)) == 0:
        return draw(st.sampled_from(RAW) | st.binary(max_size=60))
    lines = file.suffix == ".jsonl"
    text = file.read_text()
    rows = [json.loads(line) for line in text.splitlines()] if lines else [json.loads(text)]
    row = draw(st.integers(0, len(rows) - 1))
    place = draw(st.sampled_from([*places(rows[row])]))
    value = MISSING if place and draw(st.integers(0, 3)) == 0 else draw(VALUES)
    rows[row] = replaced(rows[row], place, value)
    return "".join(json.dumps(each) + "\n" for each in rows).encode()


@pytest.mark.parametrize(("file", "readers"), READ, ids=[file for file, _ in READ])
@bounded(4)
@given(data=st.data())
def test_a_file_of_a_run_is_read_or_named(whole, ends, file, readers, data):
    path = whole / file
    good = path.read_bytes()
    path.write_bytes(data.draw(contents(path)))
    try:
        for reader in readers:
            ends(*READERS[reader])
            forget()
    finally:
        path.write_bytes(good)


EXAMPLE = Path(__file__).parents[2] / "configs" / "explain_example.json"


@pytest.mark.parametrize("objective", ["opd", "dear"])
@bounded(6)
@given(data=st.data())
def test_rollouts_to_explain_are_read_or_named(objective, whole, ends, data):
    Path("rollouts.json").write_bytes(data.draw(contents(EXAMPLE)))
    ends("explain", "--objective", objective, "rollouts.json")


ODD = {
    "a folder": lambda path: path.mkdir(),
    "a pipe": lambda path: os.mkfifo(path),
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("kind", ODD)
def test_what_is_no_file_in_the_place_of_one_is_read_as_empty_or_named(kind, whole, ends):
    for file, readers in READ:
        path = whole / file
        path.rename(beside := path.with_name("beside"))
        try:
            ODD[kind](path)
            for reader in readers:
                ends(*READERS[reader])
                forget()
        finally:
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
            beside.rename(path)


WORDS = [
    *TEXTS,
    *("run", "demo.toml", "run/config.json", "nowhere", "run.steps=0", "k=1", "=", "--", "-"),
    *("--json", "--offline", "--help", "--resume", "--nodes", "--objective", "-o", "--kind"),
    *("slurm", "render", "opd", "--checkpoint", "best", "9" * 5000, "a" * 5000, "x/" * 3000),
    *("--like", "--rates", "generator=1,teacher=1,learner=1", "--compare", "generators=0"),
]


@bounded(50)
@given(
    command=st.sampled_from([*COMMANDS, "", "tarin", "-h", "\udcff"]),
    words=st.lists(st.sampled_from(WORDS) | st.text(max_size=6), max_size=4),
)
def test_words_of_a_command_are_done_or_named(whole, ends, command, words):
    asks = {"status", "logs", "stop", "submit", "scale"}  # somebody who is not there
    trains = {"demo", "train", "eval"}
    if command in asks:
        words = [*words, "--nonesuch"]
    elif command in trains:
        words = [*words, "run.steps=0"]
    elif command == "explain":  # its files: below
        words = [*words, "a.json", "b.json"]
    elif command == "plan":
        words = [*words, "--offline"]
    elif command in ("report", "trace", "export", "cluster"):
        words = [*words, "-o", "out"]
    before = sorted(whole.parent.rglob("*"))
    ends(command, *words)
    forget()
    assert sorted(whole.parent.rglob("*")) == before
