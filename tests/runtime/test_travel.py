"""Of a working directory no secret and nothing from outside of it travels with a job."""

import os
import re
import zipfile

import pytest

from async_opd.core.errors import ConfigError
from async_opd.runtime.jobs import packed
from async_opd.runtime.travel import NAMED, left_behind

SECRET = [
    ".env",
    ".env.local",
    ".ENV",
    "deep/er/.env.production",
    "prod.env",
    ".envrc",
    "id_rsa",
    "id_ed25519.pub",
    "server.pem",
    "tls/a.key",
    ".netrc",
    ".aws/credentials",
    ".ssh/config",
    ".kube/config",
    "credentials-prod.json",
    "auth_token",
    "gcp-credentials.json",
    ".ray/auth_token",
    "secrets.toml",
    ".git-credentials",
    ".pypirc",
    ".npmrc",
    "id_ecdsa",
    "a.p12",
    "vault.kdbx",
    "infra/terraform.tfstate",
    ".docker/config.json",
    ".huggingface/token",
    "kubeconfig.yaml",
    "hf_token.txt",
]
OTHERS = [
    "tokenizer.json",
    "tokens.py",
    "keys.py",
    "environment.toml",
    "monkey.txt",
    "key.py",
    "env.py",
    "data/train.jsonl",
    "special_tokens_map.json",
    "credentials.py",
    "key.jsonl",
    "hf_tokenizer/tokenizer.json",
    "auth_tokens.py",
]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "folder").mkdir()

    def make(*paths: str):
        for path in paths:
            file = tmp_path / "folder" / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(path)
        return tmp_path / "folder"

    return make


def travels(folder) -> set[str]:
    with packed(folder, {}) as package, zipfile.ZipFile(package) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


def test_secrets_stay_and_are_named_in_one_line(folder, capsys):
    assert travels(folder(*OTHERS)) == set(OTHERS)
    assert capsys.readouterr().err == ""
    assert travels(folder(*SECRET)) == set(OTHERS)
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert line.startswith("left behind, as secrets or links that lead out: .ENV, .aws, .docker, ")
    assert left_behind(folder()) == sorted(
        {
            re.sub(r"^(\.\w+)/.*", r"\1", name)  # a folder as a whole
            for name in SECRET
        }
    )
    assert f" and {len(left_behind(folder())) - NAMED} more\n" in line


def test_links_that_lead_out_stay_and_those_that_do_not_are_followed(folder, tmp_path, capsys):
    inside = folder("data/a.jsonl", "data/.env", "b.toml")
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "notes").touch()
    links = {
        "out": tmp_path / "secrets",
        "file": tmp_path / "secrets" / "notes",
        "relative": "../secrets/notes",
        "data/up": "..",
        "here": ".",
        "by way of": "out/notes",
        "gone": "/nowhere",
        "same": "data",
        "renamed": "data/.env",
        "a*b[c] ": tmp_path / "secrets",
    }
    for name, target in links.items():
        (inside / name).symlink_to(target)
    (inside / "a_b").symlink_to("b.toml")
    assert travels(inside) == {"data/a.jsonl", "same/a.jsonl", "b.toml", "a_b"}
    line = capsys.readouterr().err
    stay = {*links, "data/.env", "same/.env", "same/up"} - {"same"}
    assert set(line.removesuffix("\n").partition("out: ")[2].split(", ")) == stay


def test_links_that_lead_in_circles_or_into_a_secret_folder_stay(folder, capsys):
    inside = folder("a/a.jsonl", "b/b.jsonl", ".aws/config", "lib/.git/config", "notes")
    links = {"a/b": "../b", "b/a": "../a", "profile": ".aws/config", "hard/link": "../notes"}
    (inside / "hard").mkdir()
    for name, target in links.items():
        (inside / name).symlink_to(target)
    assert travels(inside) == {
        *("a/a.jsonl", "a/b/b.jsonl", "b/b.jsonl", "b/a/a.jsonl", "notes", "hard/link")
    }
    assert ": .aws, a/b/a, b/a/b, profile\n" in capsys.readouterr().err


def test_a_folder_that_cannot_be_packed_is_named_in_one_line(folder):
    inside = folder("a.jsonl")
    os.mkfifo(inside / "pipe")
    assert travels(inside) == {"a.jsonl"}
    (inside / ".gitignore").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=f"^--working-dir {inside}: "):
        travels(inside)
