"""Rules for a scorer that somebody else's servers are, and the key that they ask for."""

import os
import re
from collections.abc import Iterator, Mapping

import msgspec

from async_opd.config.teacher_rules import Rule
from async_opd.core.errors import ConfigError
from async_opd.core.secret import Secret
from async_opd.core.suggest import shown
from async_opd.core.urls import flaw, is_open, normal, shown_url
from async_opd.roles.teacher.config import ScorerConfig, TeacherConfig, TeacherSamplingConfig
from async_opd.roles.verifier.config import VerifyConfig

VARIABLE = re.compile("[A-Z_][A-Z0-9_]*")  # what no key looks like: it may be shown
KEY = re.compile("[!-~]+")  # what a header may hold
# What a server has chosen for itself, with whose backend it has an effect.
THEIRS = (
    "replicas",
    "batch_tokens",
    "flush_s",
    "head_chunk_rows",
    "tensor_parallel_size",
    "memory_gib",
    "gpu_memory_utilization",
    "engine",
)


def server_rules(
    scorers: Mapping[str, ScorerConfig],
    sampling: TeacherSamplingConfig | None,
    verify: VerifyConfig,
) -> Iterator[Rule]:
    """Yield what scorers that servers are, by their sections, may be."""
    for section, scorer in scorers.items():
        if scorer.backend != "server":
            yield from _without(section, scorer)
            continue
        yield (
            sampling is not None and isinstance(scorer, TeacherConfig),
            f"{section}.backend = 'server': must be 'transformers' or 'vllm' with"
            " [teacher_sampling], whose engines hold the teacher's weights",
        )
        yield from _no_effect(section, scorer)
        yield from _addresses(section, scorer)
        yield from key_rules(section, scorer)
        yield (
            scorer.key_env in verify.env,
            f"verify.env: must not name {scorer.key_env}, the key of {section}.key_env, which goes"
            " to its servers alone",
        )


def url_rules(section: str, url: str, *, with_key: bool) -> list[Rule]:
    """List what the address of one server must be."""
    called, wrong = f"{section}.urls: {shown_url(url)}", flaw(url)
    return [
        (bool(wrong), f"{called}: {wrong}"),
        (
            not wrong and with_key and is_open(url),
            f"{called}: must be https, or of this machine itself (localhost), with"
            f" {section}.key_env: anybody on the way could read the key",
        ),
    ]


def key_rules(section: str, scorer: ScorerConfig) -> list[Rule]:
    """List what the name of a variable must be; none that is wrong is shown: it may be the key."""
    name = scorer.key_env
    return [
        (
            name is not None and not VARIABLE.fullmatch(name),
            f"{section}.key_env: must be the name of an environment variable, in capitals, digits"
            " and _, not the key itself",
        )
    ]


def key_of(section: str, scorer: ScorerConfig) -> Secret | None:
    """Read the key that goes with each request to a scorer's servers; None where they want none.
    Raises ConfigError, which shows nothing of it."""
    name = scorer.key_env
    if name is None:
        return None
    called = f"{section}.key_env = {name!r}"
    key = os.environ.get(name)
    if not key:
        raise ConfigError(
            f"{called}: there is no such variable, or it is empty, in the environment of the"
            " process that trains: a submitted job has that of its cluster"
        )
    if not KEY.fullmatch(key):
        raise ConfigError(f"{called}: its value must be visible ASCII without white space")
    return Secret(key)


def _without(section: str, scorer: ScorerConfig) -> list[Rule]:
    """List what has no effect without servers."""
    without = f"has no effect with {section}.backend = {scorer.backend!r}"
    return [
        (bool(scorer.urls), f"{section}.urls: {without}; did you mean 'server'?"),
        (scorer.key_env is not None, f"{section}.key_env: {without}"),
    ]


def _no_effect(section: str, scorer: ScorerConfig) -> list[Rule]:
    """List what each server has chosen for itself."""
    defaults = {field.name: field.default for field in msgspec.structs.fields(ScorerConfig)}
    defaults["engine"] = {}
    rules: list[Rule] = []
    for name in THEIRS:
        value = getattr(scorer, name)
        why = "its members are its urls" if name == "replicas" else "its servers have their own"
        rules.append(
            (
                value != defaults[name],
                f"{section}.{name} = {shown(value)}: has no effect with {section}.backend ="
                f" 'server': {why}",
            )
        )
    return rules


def _addresses(section: str, scorer: ScorerConfig) -> Iterator[Rule]:
    """Yield that there are addresses, each of another server."""
    yield (
        not scorer.urls,
        f"{section}.urls: missing; must be a list of one or more of http://HOST:PORT with"
        f" {section}.backend = 'server'",
    )
    names: set[str] = set()
    for url in scorer.urls:
        yield from url_rules(section, url, with_key=scorer.key_env is not None)
        yield (
            normal(url) in names,
            f"{section}.urls: {shown_url(url)} stands there twice: each server once",
        )
        names.add(normal(url))
