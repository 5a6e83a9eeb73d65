"""What an engine is started with, by device."""

import os

import pytest

from async_opd.core.role_settings import GeneratorSettings
from async_opd.core.wire import Needs
from async_opd.roles.rollout.config import RolloutConfig
from async_opd.toy import STUDENT

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::Warning"),  # those of importing vLLM
]
GIB = 1 << 30


@pytest.fixture
def card(monkeypatch):
    """Has vLLM believe in a card of so many GiB; 0: in a CPU."""
    from async_opd.roles.rollout import engine_args as module

    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "none")  # restored, whatever is set

    def believe(gib: int, name: str = "H100") -> None:
        from vllm.platforms import current_platform

        monkeypatch.setattr(current_platform, "is_cpu", lambda: gib == 0)
        monkeypatch.setattr(current_platform, "get_device_total_memory", lambda: gib * GIB)
        monkeypatch.setattr(current_platform, "get_device_name", lambda: name)
        monkeypatch.setattr(module, "cpu_engine", lambda memory_gib, enforce_eager: {})

    return believe


def arguments(*, longest: int = 16_384, **config):
    from async_opd.roles.rollout.engine_args import engine_args

    settings = GeneratorSettings(
        name="generator 0",
        model=str(STUDENT),
        eos_ids=(),
        max_prompt_tokens=1024,
        vocabulary=((0, 24),),
        backend="gloo",
        seed=0,
    )
    rollout = RolloutConfig(max_new_tokens=8, enforce_eager=True, **config)
    return engine_args(settings, rollout, Needs(), longest=longest, block=16)


@pytest.mark.parametrize(
    ("gib", "name", "tokens"),
    [(0, "cpu", None), (24, "L4", 2048), (80, "H100", 8192), (180, "B200", 16384)],
    ids=["cpu", "small", "80 GB", "180 GB"],
)
def test_an_engine_prefills_what_vllms_own_server_would(gib, name, tokens, card):
    card(gib, name)
    assert arguments().max_num_batched_tokens == tokens


def test_no_more_than_all_its_sequences_hold(card):
    card(80)
    assert arguments(longest=100, concurrency=4).max_num_batched_tokens == 400


@pytest.mark.parametrize("before", [None, "0", "1"], ids=["unset", "first", "second"])
@pytest.mark.parametrize(
    ("gib", "patched", "runner"), [(0, False, "0"), (80, False, "1"), (80, True, "0")]
)
def test_the_model_runner_is_ours_to_choose(gib, patched, runner, before, card, monkeypatch):
    from async_opd.roles.rollout.engine_args import pin_runner

    card(gib)
    if before is None:
        monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER")
    else:
        monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", before)
    pin_runner(patched=patched)
    assert os.environ["VLLM_USE_V2_MODEL_RUNNER"] == runner


@pytest.mark.parametrize(
    ("table", "arrived"),
    [
        ({"quantization": "fp8"}, "fp8"),
        ({"kv_cache_dtype": "fp8"}, "fp8"),
        ({"max_num_batched_tokens": 8192}, 8192),
        (
            {
                "speculative_config": {
                    "method": "ngram",
                    "num_speculative_tokens": 2,
                    "prompt_lookup_max": 3,
                }
            },
            "ngram",
        ),
        ({"compilation_config": {"cudagraph_mode": "NONE"}}, "NONE"),
    ],
    ids=["fp8 weights", "fp8 KV", "batched tokens", "speculation", "a table in it"],
)
def test_a_table_reaches_what_vllm_makes_of_it(table, arrived):
    from async_opd.roles.models.vllm_cpu import cpu_engine
    from async_opd.roles.rollout.engine_args import with_table

    ours = dict(model=str(STUDENT), dtype="bfloat16", max_model_len=64)
    args = with_table("teacher", ours | cpu_engine(1, enforce_eager=True), table)
    made = args.create_engine_config()
    speculation = made.speculative_config and made.speculative_config.method
    there = {
        "quantization": made.model_config.quantization,
        "kv_cache_dtype": made.cache_config.cache_dtype,
        "max_num_batched_tokens": made.scheduler_config.max_num_batched_tokens,
        "speculative_config": speculation,
        "compilation_config": made.compilation_config.cudagraph_mode.name,
    }
    assert [there[name] for name in table] == [arrived]
