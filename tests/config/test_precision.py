import pytest

from async_opd.cli.demo import CONFIG
from async_opd.config.load import load
from async_opd.config.precision import refuse_on_gpus, with_dtypes
from async_opd.core.errors import ConfigError

LONG = [
    "rollout.max_new_tokens=16368",
    "learner.micro_batch_tokens=16384",
    "teacher.batch_tokens=16384",
    "sync.parity_tolerance=0.2",
    "learner.zero_stage=1",
]


def dtypes(config):
    sections = config.learner, config.rollout, *config.scorers.values()
    return {section.dtype for section in sections}


def test_an_absent_dtype_is_what_the_machine_is_good_at():
    config = load(CONFIG)
    assert dtypes(config) == {None}
    assert dtypes(with_dtypes(config, gpus=True)) == {"bfloat16"}
    assert dtypes(with_dtypes(config, gpus=False)) == {"float32"}


def test_a_dtype_that_is_set_stays_and_a_reference_has_one():
    asked = ["learner.dtype=float32", "objective.tag=g_opd", "objective.lam=1.25"]
    config = with_dtypes(load(CONFIG, asked), gpus=True)
    assert config.learner.dtype == "float32" and config.scorers["reference"].dtype == "bfloat16"


def test_what_an_absent_dtype_asks_for_is_refused_once_the_machine_is_known():
    config = with_dtypes(load(CONFIG, ["sync.parity_tolerance=0.2"]), gpus=True)
    with pytest.raises(ConfigError, match=r"learner\.dtype = 'bfloat16': needs learner\.zero_stage"):
        refuse_on_gpus(config, {})


@pytest.mark.parametrize(
    ("asked", "heads", "said"),
    [
        ("learner.dtype=float32", {"student": (16, 8)}, "learner.dtype = 'float32'.* = 16.0 GiB"),
        ("teacher.dtype=float32", {"teacher": (32, 8)}, "teacher.dtype = 'float32'.* = 32.0 GiB"),
        ("learner.dtype=float32", {"student": (16, 16)}, None),  # a fused kernel takes these
        ("learner.dtype=bfloat16", {"student": (16, 8)}, None),
    ],
)
def test_float32_attention_that_would_hold_its_scores_is_refused_with_numbers(asked, heads, said):
    config = with_dtypes(load(CONFIG, [*LONG, asked]), gpus=True)
    if said is None:
        refuse_on_gpus(config, heads)
    else:
        with pytest.raises(ConfigError, match=said):
            refuse_on_gpus(config, heads)
