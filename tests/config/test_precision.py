import pytest
from msgspec.structs import replace

from async_opd.cli.demo import CONFIG
from async_opd.config.load import load
from async_opd.config.precision import refuse_on_gpus, with_dtypes
from async_opd.core.errors import ConfigError
from async_opd.objectives.g_opd import GOpd


def long(**learner_and_teacher):
    """The demo at 16,384 tokens, with these dtypes of learner and teacher."""
    config = load(CONFIG)
    learner, teacher = (
        learner_and_teacher.get(name, "bfloat16") for name in ("learner", "teacher")
    )
    return replace(
        config,
        rollout=replace(config.rollout, max_new_tokens=16384 - config.data.max_prompt_tokens),
        learner=replace(config.learner, micro_batch_tokens=16384, zero_stage=1, dtype=learner),
        teacher=replace(config.teacher, batch_tokens=16384, dtype=teacher),
    )


def dtypes(config):
    sections = config.learner, config.rollout, *config.scorers.values()
    return {section.dtype for section in sections}


def test_an_absent_dtype_is_what_the_machine_is_good_at():
    config = load(CONFIG)
    assert dtypes(config) == {None}
    assert dtypes(with_dtypes(config, gpus=True)) == {"bfloat16"}
    assert dtypes(with_dtypes(config, gpus=False)) == {"float32"}


def test_a_dtype_that_is_set_stays_and_a_reference_has_one():
    config = replace(load(CONFIG, ["learner.dtype=float32"]), objective=GOpd(lam=1.25))
    config = with_dtypes(config, gpus=True)
    assert config.learner.dtype == "float32" and config.scorers["reference"].dtype == "bfloat16"


@pytest.mark.parametrize(
    ("overrides", "gpus", "stage"),
    [
        ([], False, 0),
        ([], True, 1),  # the least that keeps float32 weights to update
        (["learner.dtype=float32"], True, 0),
        (["learner.dtype=bfloat16"], False, 1),
        (["learner.offload_optimizer=true"], False, 1),
        (["learner.zero_stage=3"], True, 3),
    ],
)
def test_an_absent_zero_stage_is_the_least_that_is_allowed(overrides, gpus, stage):
    config = with_dtypes(load(CONFIG, overrides), gpus=gpus)
    assert config.learner.zero_stage == stage
    refuse_on_gpus(config, {})


def test_what_an_absent_dtype_asks_for_is_refused_once_the_machine_is_known():
    config = with_dtypes(load(CONFIG, ["learner.zero_stage=0"]), gpus=True)
    with pytest.raises(ConfigError, match=r"learner\.dtype = 'bfloat16': needs learner"):
        refuse_on_gpus(config, {})


def test_on_gpus_an_adapter_that_travels_alone_is_not_float32_in_the_generators():
    overrides = ["student.lora.rank=4", "rollout.dtype=float32"]
    refuse_on_gpus(with_dtypes(load(CONFIG, [*overrides, "sync.lora=merged"]), gpus=True), {})
    alone = with_dtypes(load(CONFIG, [*overrides, "sync.lora=adapter"]), gpus=True)
    with pytest.raises(ConfigError, match=r"rollout\.dtype = 'float32': must be 'bfloat16'"):
        refuse_on_gpus(alone, {})


@pytest.mark.parametrize(
    ("asked", "heads", "said"),
    [
        (dict(learner="float32"), {"student": (16, 8)}, "learner.dtype = 'float32'.* = 16.0 GiB"),
        (dict(teacher="float32"), {"teacher": (32, 8)}, "teacher.dtype = 'float32'.* = 32.0 GiB"),
        (dict(learner="float32"), {"student": (16, 16)}, None),  # a fused kernel takes these
        ({}, {"student": (16, 8)}, None),
    ],
)
def test_float32_attention_that_would_hold_its_scores_is_refused_with_numbers(asked, heads, said):
    config = with_dtypes(long(**asked), gpus=True)
    if said is None:
        refuse_on_gpus(config, heads)
    else:
        with pytest.raises(ConfigError, match=said):
            refuse_on_gpus(config, heads)
