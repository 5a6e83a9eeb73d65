"""README is true where a machine can tell: its length, links, commands and the objective it shows;
and the map of the package is.

`python tests/e2e/newcomer.py` runs all of its commands, in an empty environment.
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import async_opd
from async_opd.cli.main import parsed
from async_opd.config.load import load
from async_opd.objectives import all_objectives

ROOT = Path(async_opd.__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [
    "README.md",
    "async_opd/objectives/README.md",
    "configs/README.md",
    "cluster/README.md",
    "tests/README.md",
    "benchmarks/README.md",
]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def commands() -> list[list[str]]:
    """What stands behind `async-opd` in README, a command each; shell variables stay as they are
    written."""
    text = (
        "\n".join(blocks("bash")) + "\n" + "\n".join(re.findall(r"`(async-opd [a-z].*?)`", README))
    )
    found = re.findall(r"async-opd ([a-z][^|;)\n]*)", text)
    return [shlex.split(command, comments=True) for command in found]


def test_it_is_read_in_one_go_and_its_first_commands_come_first():
    lines = README.splitlines()
    assert len(lines) <= 200
    assert max(lines.index("make demo"), lines.index("make test")) < 40


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(((?!https?:)[^)]+)\)", text)]
    assert [
        target
        for target in targets
        if target and not (ROOT / page).parent.joinpath(target).exists()
    ] == []


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_its_commands_are_commands(command, monkeypatch):
    """They parse, and where they take a config and settings, those are right."""
    monkeypatch.chdir(ROOT)
    parsed(command)
    words = [word for word in command if word.endswith(".toml")]
    settings = [
        word.replace("$RUN", "/shared/run")
        for word in command
        if re.fullmatch(r"[a-z_]+\.[a-z_.]+=.*", word)
    ]
    if words:
        load(words[0], settings)


def test_its_objective_is_one_file_and_does_what_it_says(tmp_path):
    (shown,) = blocks("python")
    assert len(shown.splitlines()) <= 16
    (tmp_path / "disputed_opd.py").write_text(shown)
    code = f"""
import async_opd.objectives as folder
folder.__path__.append({str(tmp_path)!r})
from async_opd.cli.main import main
example = {str(ROOT / "configs" / "explain_example.json")!r}
main(["explain", "--objective", "disputed_opd", "full=0.2", "signal_at_most=1.5", example])
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    rows = [line.split() for line in found.stdout.splitlines()[2:8]]
    # log π_T - log π of the file's first trajectory: -0.05, 0.50, -3.00, -0.50, 0.00, 0.01
    assert [float(row[7]) for row in rows] == [0.25, 1.0, 1.0, 1.0, 0.0, 0.05]
    # the settings of every objective are its too
    assert [row[6] for row in rows] == [
        "-0.0500",
        "0.5000",
        "-1.5000*",
        "-0.5000",
        "0.0000",
        "0.0100",
    ]


def test_the_page_of_methods_has_each_objective_once():
    page = (ROOT / "async_opd" / "objectives" / "README.md").read_text(encoding="utf-8")
    _, *listed = re.findall(r"^\| `([a-z_]+)` \|", page, re.MULTILINE)  # behind the heading
    assert sorted(listed) == sorted(all_objectives())


def test_the_map_names_every_file_and_folder_of_the_package():
    own = {path for path in (ROOT / "async_opd").iterdir() if path.is_dir() or path.suffix == ".py"}
    own = {path for path in own if not path.name.startswith("__")}
    assert [
        p.name
        for p in sorted(own)
        if not re.search(rf"\b{p.name}{'/' if p.is_dir() else ''}", async_opd.__doc__)
    ] == []
