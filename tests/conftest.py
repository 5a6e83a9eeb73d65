import atexit
import gc
import os
import signal
import tempfile
from collections.abc import Callable, Iterator

import pytest

# read when torch is first imported; child processes inherit it
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# a shell has what it starts in the background ignore it, and their children
signal.signal(signal.SIGINT, signal.default_int_handler)

TINY = dict(
    vocab_size=40,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=64,
    initializer_range=0.3,  # wide, so that a random model is sure of some tokens
)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Nothing that is imported is garbage: no collection looks through it, neither meanwhile nor
    during the tests, a sixth of whose time that would take."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()
        atexit.register(gc.unfreeze)  # what is frozen at exit, triton's bindings report as leaked


@pytest.fixture(scope="session", autouse=True)
def own_cluster() -> Iterator[None]:
    """No test finds a cluster that runs on this machine, of a user or of another process of tests:
    Ray leaves where one is in its folder for temporary files."""
    with (
        # short, for names of sockets
        tempfile.TemporaryDirectory(
            prefix="ray-", dir="/tmp", ignore_cleanup_errors=True
        ) as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("RAY_TMPDIR", folder)
        patch.delenv("RAY_ADDRESS", raising=False)
        yield


@pytest.fixture
def unheard(caplog) -> Callable[[], list[str]]:
    """What asyncio says of errors that nobody has asked for, once what is done with is gone."""

    def reported() -> list[str]:
        gc.collect()
        return [record.getMessage() for record in caplog.records if record.name == "asyncio"]

    return reported


@pytest.fixture(scope="session")
def tiny_lm() -> Callable:
    """Makes a random causal LM of a transformers family, the same for the same seed and
    settings."""
    import torch
    import transformers

    def build(family: str = "Qwen3", *, seed: int = 0, **settings) -> transformers.PreTrainedModel:
        torch.manual_seed(seed)
        config = getattr(transformers, f"{family}Config")(**(TINY | settings))
        return transformers.AutoModelForCausalLM.from_config(config)

    return build


@pytest.fixture
def synced_and_renamed(tmp_path, monkeypatch) -> Callable[[], list[str]]:
    """From its call on, notes what below `tmp_path` is put on the disk, and "-> name" of what gets
    one, in order."""

    def start() -> list[str]:
        done, sync, rename = [], os.fsync, os.rename

        def recorded(descriptor):
            done.append(os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), tmp_path))
            sync(descriptor)

        def renamed(source, target):
            done.append(f"-> {os.path.relpath(target, tmp_path)}")
            rename(source, target)

        monkeypatch.setattr(os, "fsync", recorded)
        monkeypatch.setattr(os, "rename", renamed)
        return done

    return start
