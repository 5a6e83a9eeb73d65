"""A ~ is the user's home wherever a path may stand: in a file, a setting, an option, a word."""

import shutil

import pytest

from async_opd.cli.demo import CONFIG as DEMO
from async_opd.cli.main import main
from async_opd.config.evaluation import load_eval
from async_opd.config.load import load
from async_opd.core.errors import ConfigError
from async_opd.toy import STUDENT, TEACHER


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home with the demo's config, its models and rows; we stand elsewhere."""
    folder = tmp_path / "home"
    shutil.copytree(STUDENT, folder / "student")
    shutil.copytree(TEACHER, folder / "teacher")
    (folder / "rows.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    toml = DEMO.read_text().replace("toy:train", "~/rows.jsonl").replace('"toy:t', '"~/t')
    (folder / "a.toml").write_text(toml.replace("runs/demo", "~/runs/demo"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("HOME", str(folder))
    return folder


def test_settings_of_a_run(home):
    config = load(home / "a.toml", ["student.model=~/student", "eval.path=~/rows.jsonl"])
    assert config.run.dir == f"{home}/runs/demo"
    assert (
        config.inputs.items()
        >= {
            "student.model": f"{home}/student",
            "teacher.model": f"{home}/teacher",
            "data.path": f"{home}/rows.jsonl",
            "eval.path": f"{home}/rows.jsonl",
        }.items()
    )
    several = DEMO.read_text().replace("[teacher]", "[teachers.sums]")
    several = several.replace("[data]", '[data]\nteacher = "kind"')
    (home / "b.toml").write_text(several.replace("toy:teacher", "~/teacher"))
    assert load(home / "b.toml").teachers["sums"].model == f"{home}/teacher"


def test_settings_of_an_evaluation(home):
    asked = load_eval("~/student", ["data.path=~/rows.jsonl", "run.dir=~/out"])
    named = asked.student.model, asked.data.path, asked.run.dir
    assert named == (f"{home}/student", f"{home}/rows.jsonl", f"{home}/out")


@pytest.mark.parametrize(
    "words",
    [
        "train {}.toml",
        "train --resume={}",
        "plan {}.toml --offline",
        "plan ~/a.toml --offline --like={}",
        "submit {}.toml",
        "submit ~/a.toml --working-dir={}",
        "eval {}.toml",
        "eval --compare {} {}",
        "export {}",
        "report {}",
        "trace {}",
        "explain --objective opd {}.json",
        "audit {}",
        "scale {} generators=2",
        "cluster render --kind slurm {}.toml",
        "audit ~nobody-of-this-name/run",
        "train ~/a.toml run.dir=~nobody-of-this-name/run",
    ],
)
def test_words_of_the_command_line(words, home, capsys):
    assert main(words.replace("{}", "~/missing").split()) == 2
    line = capsys.readouterr().err
    assert f"{home}/missing" in line or "there is no user 'nobody-of-this-name' here" in line
    assert "~" not in line or "nobody" in line
    assert line.count("\n") == 1


def test_a_file_that_is_written(home, tmp_path, monkeypatch):
    settings = ["data.path=toy:train", "teacher.model=toy:teacher", "run.dir=/shared/a"]
    words = ["cluster", "render", "--kind", "slurm", "~/a.toml", *settings]
    assert main([*words, "-o", "~/a.sh"]) == 0
    assert (home / "a.sh").exists() and not list((tmp_path / "elsewhere").iterdir())


def test_the_home_of_a_cluster_is_none_of_ours(home):
    with pytest.raises(ConfigError, match=r"data\.path = '~/rows\.jsonl': no such file or folder"):
        load(home / "a.toml", ["teacher.model=toy:teacher"], elsewhere=True)
