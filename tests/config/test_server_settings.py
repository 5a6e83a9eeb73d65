"""A scorer that somebody's servers are: what its section may say, and what it may not, by the real
command line."""

import subprocess
import sys

import pytest

from async_opd.cli.demo import CONFIG as DEMO
from async_opd.cli.main import main
from async_opd.config.load import load
from async_opd.config.server_rules import key_of
from async_opd.core.errors import ConfigError
from async_opd.core.urls import flaw, is_open, normal
from async_opd.runtime.placement import resource_requests

SERVER = "teacher.backend=server"
ONE = 'teacher.urls=["http://localhost:8000"]'
FAR = 'teacher.urls=["http://a:8000"]'
SECRET = "sk-Do-Not-Show-9d1f"

MISTAKES = {
    "no server": ([SERVER], ["teacher.urls: missing; must be a list of one or more of http://"]),
    "one that is no list": (
        [SERVER, "teacher.urls=http://a:8000"],
        ["teacher.urls = 'http://a:8000': must be a list of a string"],
    ),
    "none in the list": ([SERVER, "teacher.urls=[]"], ["teacher.urls: missing"]),
    "an empty one": ([SERVER, 'teacher.urls=[""]'], ["teacher.urls: ''", "http://HOST:PORT"]),
    "no scheme": ([SERVER, 'teacher.urls=["a:8000"]'], ["'a:8000'", "http://HOST:PORT"]),
    "another scheme": ([SERVER, 'teacher.urls=["grpc://a:1"]'], ["'grpc://a:1'", "https://"]),
    "a port beyond": (
        [SERVER, 'teacher.urls=["http://a:80000"]'],
        ["http://HOST:PORT", "PORT below 65536"],
    ),
    "a password that is read as a port": (
        [SERVER, f'teacher.urls=["http://me:{SECRET}/b@a:8000"]'],
        ["teacher.urls: 'http://a:8000': it must be http://HOST:PORT"],
    ),
    "a password before a name that is none": (
        [SERVER, f'teacher.urls=["http://me:{SECRET}@h\u2100st"]'],
        ["teacher.urls: 'http://h℀st': it must be http://HOST:PORT"],
    ),
    "a name with nothing between two dots": (
        [SERVER, 'teacher.urls=["http://a..b:8000"]'],
        ["teacher.urls: 'http://a..b:8000': it must be http://HOST:PORT", "a name or an address"],
    ),
    "no port": ([SERVER, 'teacher.urls=["http://a:0"]'], ["'http://a:0'", "http://HOST:PORT"]),
    "white space": ([SERVER, 'teacher.urls=["http://a :80"]'], ["white space"]),
    "the same one": (
        [SERVER, 'teacher.urls=["http://A:80/", "http://a/v1"]'],
        ["teacher.urls: 'http://a/v1' stands there twice"],
    ),
    "user and password": (
        [SERVER, f'teacher.urls=["http://me:{SECRET}@a:8000"]'],
        ["teacher.urls: 'http://a:8000': it must hold no user and no password; key_env names"],
    ),
    "user and password in no list": (
        [SERVER, f"teacher.urls=http://me:{SECRET}@a:8000"],
        ["teacher.urls = 'http://…@a:8000'"],
    ),
    "a key in the address": (
        [SERVER, f'teacher.urls=["http://a:8000?api_key={SECRET}"]'],
        ["teacher.urls: 'http://a:8000': it must hold nothing behind a ?"],
    ),
    "the key itself": (
        [SERVER, ONE, f"teacher.key_env={SECRET}"],
        ["teacher.key_env: must be the name of an environment variable, in capitals"],
    ),
    "the key as a setting": (
        [SERVER, ONE, f"teacher.api_key={SECRET}"],
        ["teacher.api_key: no key is written down here: `key_env` of a teacher names"],
    ),
    "a key that anybody could read": (
        [SERVER, FAR, "teacher.key_env=THEIR_KEY"],
        ["teacher.urls: 'http://a:8000': must be https, or of this machine itself (localhost)"],
    ),
    "a key for the checks": (
        [SERVER, ONE, "teacher.key_env=THEIR_KEY", 'verify.env=["THEIR_KEY"]'],
        ["verify.env: must not name THEIR_KEY, the key of teacher.key_env"],
    ),
    "servers of another backend": (
        [ONE],
        ["teacher.urls: has no effect with teacher.backend = 'transformers'", "'server'?"],
    ),
    "a key of another backend": (
        ["teacher.backend=vllm", "teacher.key_env=THEIR_KEY"],
        ["teacher.key_env: has no effect with teacher.backend = 'vllm'"],
    ),
    "replicas": (
        [SERVER, ONE, "teacher.replicas=2"],
        ["teacher.replicas = 2: has no effect with teacher.backend = 'server'", "are its urls"],
    ),
    "temperature": (
        [SERVER, ONE, "rollout.temperature=0.7"],
        ["rollout.temperature = 0.7: must be 1 with teacher.backend = 'server'"],
    ),
    "entropy": (
        [SERVER, ONE, "objective.tag=eopd"],
        ["teacher.backend = 'server': must be 'transformers' for objective.tag = 'eopd'"],
    ),
    "a teacher that moves": (
        [SERVER, ONE, "teacher.update=ema", "teacher.model=toy:student"],
        ["teacher.update = 'ema': must be 'frozen' with teacher.backend = 'server'"],
    ),
    "its own answers": (
        [
            SERVER,
            ONE,
            "teacher_sampling.share=0.1",
            "teacher_sampling.full_until_step=3",
            "teacher_sampling.until_step=5",
        ],
        ["teacher.backend = 'server': must be 'transformers' or 'vllm' with [teacher_sampling]"],
    ),
    "one of several": (
        [
            "teachers.a.model=toy:teacher",
            "teachers.a.backend=server",
            'teachers.a.urls=["ftp://x"]',
            "data.teacher=kind",
        ],
        ["teachers.a.urls: 'ftp://x'"],
    ),
    "the reference": (
        [
            "objective.tag=g_opd",
            "reference.backend=server",
            'reference.urls=["http://a:1", "http://a:1/"]',
        ],
        ["reference.urls: 'http://a:1/' stands there twice"],
    ),
} | {
    f"{name} of the server's own": (
        [SERVER, ONE, f"teacher.{name}={value}"],
        [f"teacher.{name} = ", "has no effect with teacher.backend = 'server'"],
    )
    for name, value in {
        "batch_tokens": 4096,
        "flush_s": 0.1,
        "head_chunk_rows": 8,
        "tensor_parallel_size": 2,
        "memory_gib": 2.0,
        "gpu_memory_utilization": 0.5,
        "engine": '{ quantization = "fp8" }',
    }.items()
}


@pytest.mark.parametrize(("words", "fragments"), MISTAKES.values(), ids=MISTAKES.keys())
def test_what_a_server_cannot_be_is_refused_by_name_and_no_secret_is_shown(
    words, fragments, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("THEIR_KEY", SECRET)
    config = DEMO
    if any(word.startswith(("teachers.", "objective.tag")) for word in words):
        config = tmp_path / "demo.toml"
        text = DEMO.read_text()
        if any(word.startswith("teachers.") for word in words):
            text = text.replace('[teacher]\nmodel = "toy:teacher"\nevaluate = true', "")
        before = text.partition("[objective]")[0]
        if any(word.startswith("objective.tag") for word in words):
            text = f"{before}[objective]\n"
        config.write_text(text)
    assert main(["train", str(config), *words, f"run.dir={tmp_path / 'run'}"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("async-opd: ConfigError: ") and message.count("\n") == 1
    assert [fragment for fragment in fragments if fragment not in message] == []
    assert SECRET.lower() not in message.lower() and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("url", "known_as", "open"),
    [
        ("http://a:8000", "http://a:8000", True),
        ("http://A:8000/v1/", "http://a:8000", True),
        ("https://a", "https://a", False),
        ("https://a:443/teacher/v1", "https://a/teacher", False),
        ("http://127.0.0.1:9/", "http://127.0.0.1:9", False),
        ("http://[::1]:9", "http://[::1]:9", False),
        ("http://10.0.0.4", "http://10.0.0.4", True),
        ("http://127.0.0.1.example.com", "http://127.0.0.1.example.com", True),
        ("http://localhost.example.com", "http://localhost.example.com", True),
    ],
)
def test_an_address_is_known_in_one_way_and_open_unless_it_is_encrypted_or_here(
    url, known_as, open
):
    assert (flaw(url), normal(url), is_open(url)) == ("", known_as, open)


def test_members_are_known_by_their_servers_and_take_no_cards():
    config = load(DEMO, [SERVER, 'teacher.urls=["http://B:1/", "https://a/v1"]'])
    assert config.teacher.members == ("http://b:1", "https://a")
    assert list(config.served) == ["teacher"]
    assert [pool.role for pool in config.engines] == ["generator"]
    assert "teacher" not in config.on_transformers
    requests = {each.role: each for each in resource_requests(config, gpus=True)}
    assert requests["teacher"].members == ["teacher http://b:1", "teacher https://a"]
    assert (requests["teacher"].gpus, requests["teacher"].settings) == (0.0, ("teacher.urls",))


def test_the_key_is_read_where_the_run_starts_and_never_shown(monkeypatch):
    config = load(DEMO, [SERVER, ONE, "teacher.key_env=THEIR_KEY"])
    for value in (None, ""):
        if value is None:
            monkeypatch.delenv("THEIR_KEY", raising=False)
        else:
            monkeypatch.setenv("THEIR_KEY", value)
        with pytest.raises(ConfigError, match=r"teacher\.key_env = 'THEIR_KEY': there is no such"):
            key_of("teacher", config.teacher)
    monkeypatch.setenv("THEIR_KEY", f"{SECRET}\n")
    with pytest.raises(ConfigError, match="must be visible ASCII") as refused:
        key_of("teacher", config.teacher)
    assert SECRET not in str(refused.value)
    monkeypatch.setenv("THEIR_KEY", SECRET)
    key = key_of("teacher", config.teacher)
    assert key.value == SECRET and SECRET not in f"{key} {key!r} {(key,)}"
    assert key_of("teacher", load(DEMO, [SERVER, ONE]).teacher) is None


def test_a_config_that_names_a_variable_is_read_where_there_is_none():
    code = (
        "import sys; from async_opd.config.load import load;"
        f"print(load(sys.argv[1], [{SERVER!r}, {ONE!r}, 'teacher.key_env=NOBODY_HAS']).teacher)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, DEMO], capture_output=True, text=True, check=True
    )
    assert "NOBODY_HAS" in done.stdout
