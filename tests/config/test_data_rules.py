"""What a config may say of its data: one set or several, and a filter."""

import os
from pathlib import Path

import msgspec
import pytest

from async_opd.cli.demo import CONFIG as DEMO
from async_opd.cli.main import main
from async_opd.config.load import load, load_run
from async_opd.core.errors import ConfigError
from async_opd.driver.resume import fixed, refuse_changed

PATH = 'path = "toy:train"\n'
TWO = """
[data.sources.easy]
path = "toy:train"
weight = 3

[data.sources.hard]
path = "toy:heldout"
prompt = "question"
"""
TEACHERS = (
    '[teacher]\nmodel = "toy:teacher"\nevaluate = true',
    '[teachers.a]\nmodel = "toy:teacher"',
)


@pytest.fixture
def written(tmp_path):
    """Write the demo's config with `sources` in place of its one set, and a line more in [data];
    returns the file."""

    def write(sources=TWO, more="", teachers=False) -> Path:
        text = DEMO.read_text()
        assert PATH in text and TEACHERS[0] in text
        text = text.replace(PATH, more, 1).replace("[eval]", f"{sources}\n[eval]", 1)
        (tmp_path / "run.toml").write_text(text.replace(*TEACHERS) if teachers else text)
        return tmp_path / "run.toml"

    return write


def test_one_set_stays_as_it_is():
    data = load(DEMO, ["data.prompt=q"]).data
    assert data.sets == {"data.path": data} and data.columns("prompt") == {"data.prompt": "q"}


def test_each_of_several_sets_has_what_it_says_and_the_rest_of_data(written):
    config = load(written(more='split = "train[:50%]"\n'), ["data.sources.hard.split=test"])
    easy, hard = config.data.sets.values()
    assert (easy.path, easy.split, easy.prompt, easy.id) == (
        "toy:train",
        "train[:50%]",
        "prompt",
        "id",
    )
    assert (hard.path, hard.split, hard.prompt, hard.id) == (
        "toy:heldout",
        "test",
        "question",
        "id",
    )
    assert [source.weight for source in config.data.sources.values()] == [3, 1]
    assert config.inputs["data.sources.easy.path"] == "toy:train"
    assert config.inputs["data.sources.hard.path"] == "toy:heldout"


MISTAKES = {
    "neither": (dict(sources=""), "data.path: missing; must be a text, or sections [data.sources"),
    "both": (dict(more=PATH), "data.path = 'toy:train': must not stand beside [data.sources.NAME]"),
    "no path": (dict(sources="[data.sources.a]\nweight = 1"), "data.sources.a.path: missing; must"),
    "weight 0": (
        dict(sources=TWO.replace("weight = 3", "weight = 0")),
        "data.sources.easy.weight = 0: must be a finite number > 0",
    ),
    "all weights 0": (
        dict(sources=TWO.replace("weight = 3", "weight = 0.0") + "weight = 0.0"),
        "data.sources.easy.weight = 0.0: must be a finite number > 0",
    ),
    "a weight below 0": (
        dict(sources=TWO.replace("weight = 3", "weight = -1")),
        "data.sources.easy.weight = -1: must be a finite number > 0",
    ),
    "no number": (
        dict(sources=TWO.replace("weight = 3", "weight = nan")),
        "data.sources.easy.weight = nan: must be a finite number > 0",
    ),
    "one set twice": (
        dict(sources=TWO.replace("heldout", "train")),
        "data.sources.hard.path = 'toy:train': the rows of split 'train' are those of"
        " data.sources.easy.path too; a set has one weight",
    ),
    "a name that no metric has": (
        dict(sources=TWO.replace("easy", "'a-b'")),
        "data.sources.'a-b': a name must be of letters, digits and _",
    ),
    "misspelt": (
        dict(sources=TWO.replace("weight", "wieght")),
        "data.sources.easy.wieght = 3: no such setting; did you mean 'data.sources.easy.weight'?",
    ),
    "no such file": (
        dict(sources=TWO.replace("toy:heldout", "nowhere.jsonl")),
        "data.sources.hard.path = 'nowhere.jsonl': no such file or folder",
    ),
    "a teacher's column without teachers": (
        dict(sources=TWO + 'teacher = "kind"'),
        "data.sources.hard.teacher = 'kind': has no effect without sections [teachers.NAME]",
    ),
    "a set without a teacher's column": (
        dict(sources=TWO + 'teacher = "kind"', teachers=True),
        "data.sources.easy.teacher: missing; must be the name of the column that holds a row's",
    ),
    "a solution without a context": (
        dict(sources=TWO + 'solution = "why"'),
        "data.sources.hard.solution = 'why': has no effect without a teacher's context",
    ),
    "problems without a solution": (
        dict(
            sources=TWO.replace("[data.sources.hard]", 'solution = "why"\n[data.sources.hard]')
            + 'solution = "why"'
        ),
        "data.solution: missing; must be the name of the column of eval.path with the solutions",
        'teacher.context="{prompt}{solution}"',
    ),
    "filter of no tries": (
        dict(more='filter = { drop = "both" }\n'),
        "data.filter.tries: missing; must be an integer >= 1 and <= 127",
    ),
    "filter of 0 tries": (
        dict(more="filter = { tries = 0 }\n"),
        "data.filter.tries = 0: must be an integer >= 1 and <= 127",
    ),
    "filter of too many": (
        dict(more="filter = { tries = 128 }\n"),
        "data.filter.tries = 128: must be an integer >= 1 and <= 127",
    ),
    "filter of something else": (
        dict(more='filter = { tries = 2, drop = "right" }\n'),
        "data.filter.drop = 'right': must be 'always_right', 'always_wrong' or 'both'; did you",
    ),
    "filter of a stream": (
        dict(more="filter = { tries = 2 }\nstreaming = true\n"),
        "data.filter: must be absent with data.streaming = true",
    ),
    "filter of one pass": (
        dict(more="filter = { tries = 2 }\nepochs = 1\n"),
        "data.filter: has no effect with data.epochs = 1",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_that_names_it(written, tmp_path, capsys, mistake):
    what, expected, *settings = MISTAKES[mistake]
    status = main(["train", str(written(**what)), f"run.dir={tmp_path}/run", *settings])
    error = capsys.readouterr().err
    assert status == 2 and error.count("\n") == 1, error
    assert expected in error and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ('data.sources.a.path="a.jsonl"', "data.sources: an evaluation is of one set: set data.pa"),
        ("data.filter.tries=2", "data.filter: has no effect in an evaluation, which asks each pro"),
        (
            "data.template_args.enable_thinking=true",
            "data.template_args = {'enable_thinking': True}: has no effect without data.chat_templ",
        ),
    ],
)
def test_what_has_no_effect_in_an_evaluation_is_refused(capsys, setting, expected):
    status = main(["eval", "toy:student", "--data", "toy:heldout", setting])
    error = capsys.readouterr().err
    assert status == 2 and error.count("\n") == 1 and expected in error


def test_a_home_in_the_path_of_a_source_is_the_user_s(written, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "rows.jsonl").write_text("{}")
    config = load(written(TWO.replace("toy:heldout", "~/rows.jsonl")))
    assert config.data.sources["hard"].path == f"{tmp_path}/rows.jsonl"


def test_every_relative_path_of_a_source_travels_with_a_job(written, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        Path(f"{name}.jsonl").write_text("{}")
    two = TWO.replace("toy:train", "a.jsonl").replace("toy:heldout", f"{os.getcwd()}/b.jsonl")
    config = load(written(two))
    assert config.relative_inputs == {"data.sources.easy.path": "a.jsonl"}


def test_a_run_directory_that_holds_a_source_is_refused(written, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "rows.jsonl").write_text("{}")
    file = written(TWO.replace("toy:heldout", f"{tmp_path}/run/rows.jsonl"))
    with pytest.raises(ConfigError, match=r"holds data\.sources\.hard\.path = '.*rows.jsonl'"):
        load(file, [f"run.dir={tmp_path}/run"])


@pytest.mark.parametrize(
    "change",
    ["data.sources.hard.weight=2", "data.sources.hard.id=name", "data.sources.c.path=rows"],
)
def test_a_run_goes_on_with_its_sources_and_their_weights(written, tmp_path, monkeypatch, change):
    config = load(written(), [f"run.dir={tmp_path}/run"])
    monkeypatch.chdir(tmp_path)
    Path("rows").mkdir()
    was = msgspec.json.decode(msgspec.json.encode(fixed(config)))
    refuse_changed(config, was, config.student.model)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_bytes(msgspec.json.encode(config))
    changed = load_run(tmp_path / "run", [change])
    with pytest.raises(ConfigError, match=r"^data\.sources = .*: must be .*, as the run has it"):
        refuse_changed(changed, was, changed.student.model)
