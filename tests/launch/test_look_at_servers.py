"""The servers of a run are looked at before anything starts, by the real look at a stub of one."""

import json
import shutil
import socket
import sys
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest

from async_opd import toy
from async_opd.cli.demo import CONFIG as DEMO
from async_opd.config.load import load
from async_opd.core.errors import ConfigError, DataError
from async_opd.core.vocabulary import Tokens
from async_opd.launch import run as runs
from async_opd.launch.models import check_models, tokenizer_of
from async_opd.launch.readings import views
from async_opd.launch.vocabulary import read_tokens
from async_opd.roles.teacher.server.served import PROBED
from async_opd.toy.tokenizer import build_tokenizer
from tests.roles.teacher.server.stub import V, serving

KEY = "sk-Of-Nobody-31af"


@pytest.fixture
def model(tmp_path) -> Path:
    """The toy teacher without its weights, which are elsewhere."""
    folder = tmp_path / "theirs"
    shutil.copytree(toy.TEACHER, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def asking(tmp_path: Path, model: Path, *urls: str, more: tuple[str, ...] = ()):
    settings = [
        f"run.dir={tmp_path / 'run'}",
        "teacher.backend=server",
        f"teacher.model={model}",
        f"teacher.urls={json.dumps(urls)}",
        "teacher.key_env=THEIR_KEY",
        *more,
    ]
    return load(DEMO, settings)


@pytest.fixture(autouse=True)
def read_already(monkeypatch):
    """What a run reads beside: a tokenizer, and no rows."""
    tokenizer = build_tokenizer()
    inputs = SimpleNamespace(
        tokens=Tokens(student=((0, 24),), eos_ids=(1,), whole={"teacher": ((0, 24),)}),
        tokenizer=tokenizer,
        prompts=SimpleNamespace(close=lambda: None),
    )
    module = SimpleNamespace(read=lambda config: inputs)
    monkeypatch.setitem(sys.modules, "async_opd.launch.inputs", module)


def dead() -> str:
    """The address of nobody."""
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


def test_a_server_s_model_needs_no_weights_here(tmp_path, model):
    tokenizer = tokenizer_of("student.model", str(toy.STUDENT), False)
    settings = [
        f"student.model={toy.STUDENT}",
        f"data.path={DEMO.parent}",
        "teacher.chat_template='{{ messages[0].content }}='",
    ]
    config = asking(tmp_path, model, "http://localhost:1", more=settings)
    assert read_tokens(config, tokenizer).whole == {"teacher": ((0, 24),)}
    assert views(config, tokenizer)[""].head == 24
    check_models(config)
    here = [f"teacher.model={model}", f"run.dir={tmp_path / 'run'}", *settings]
    with pytest.raises(DataError, match="holds no weights"):
        read_tokens(load(DEMO, here), tokenizer)


async def test_what_serves_is_asked_with_the_key(tmp_path, model, monkeypatch):
    monkeypatch.setenv("THEIR_KEY", KEY)
    async with serving() as one, serving() as other:
        for stub in (one, other):
            stub.model, stub.most = str(model), V
        await runs._read(asking(tmp_path, model, one.url, f"{other.url}/v1/"))
        assert {*one.keys, *other.keys} == {f"Bearer {KEY}"}


async def test_one_that_cannot_serve_is_refused_by_its_address(tmp_path, model, monkeypatch):
    monkeypatch.setenv("THEIR_KEY", KEY)
    async with serving() as one, serving() as other:
        one.model, one.most = str(model), V
        for url, why in {
            dead(): "cannot be reached",
            other.url: "serves 'tables/forty', and not model",
        }.items():
            with pytest.raises(ConfigError, match=why) as refused:
                await runs._read(asking(tmp_path, model, one.url, url))
            assert url in str(refused.value) and KEY not in str(refused.value)
        one.most = 20
        with pytest.raises(ConfigError, match="serve it with --max-logprobs 24"):
            await runs._read(asking(tmp_path, model, one.url))


async def test_one_that_does_not_repeat_itself_is_refused_before_anything_starts(
    tmp_path, model, monkeypatch
):
    """As one address does that stands for several models."""
    monkeypatch.setenv("THEIR_KEY", KEY)
    scored = []

    def bend(answer):
        """Another one with each request of the probe."""
        rows = answer["choices"][0]["prompt_logprobs"]
        scored.append(len(rows) > PROBED + 1)
        for row in rows[1:]:
            for entry in row.values():
                entry["logprob"] -= 0.1 * sum(scored)

    async with serving() as one:
        one.model, one.most, one.bend = str(model), V, bend
        with pytest.raises(ConfigError, match="answers the same probe in two ways") as refused:
            await runs._read(asking(tmp_path, model, one.url))
        assert str(refused.value).startswith(f"teacher, {one.url}: ")


async def test_a_run_whose_server_or_key_is_not_there_starts_nothing_and_leaves_nothing(
    tmp_path, model, monkeypatch
):
    def started(*_, **__):
        raise AssertionError("it starts")

    monkeypatch.setattr(runs, "Cluster", started)
    monkeypatch.setenv("THEIR_KEY", KEY)
    with pytest.raises(ConfigError, match="cannot be reached"):
        await runs.run(asking(tmp_path, model, dead()))
    monkeypatch.delenv("THEIR_KEY")
    with pytest.raises(ConfigError, match="there is no such variable"):
        await runs.run(asking(tmp_path, model, dead()))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs"]
