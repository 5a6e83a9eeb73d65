import json

import pytest

from async_opd.config.evaluation import load_eval, run_config
from async_opd.config.load import load
from async_opd.core.errors import ConfigError
from async_opd.core.wire import Sampling
from async_opd.toy import STUDENT

DATA = "data.path=toy:heldout"


def test_the_words_are_those_of_a_training_config():
    settings = [
        "k=2",
        "rollout.generators=3",
        "rollout.top_p=0.9",
        "verify.workers=2",
        "run.seed=7",
        "run.dir=there",
    ]
    config = run_config(load_eval("toy:student", [DATA, *settings]))
    assert (config.student.model, config.data.path, config.run.dir) == (
        "toy:student",
        "toy:heldout",
        "there",
    )
    assert (config.rollout.generators, config.verify.workers, config.run.seed) == (3, 2, 7)


@pytest.mark.parametrize(
    ("settings", "sampling"),
    [
        ([], Sampling(samples=1, temperature=0.0)),
        (["k=4"], Sampling(samples=4, temperature=1.0)),
        (
            ["k=4", "rollout.samples_per_prompt=8", "rollout.temperature=0.6"],
            Sampling(samples=8, temperature=0.6),
        ),
        (
            ["rollout.temperature=0.7", "rollout.top_p=0.8"],
            Sampling(samples=1, temperature=0.7, top_p=0.8),
        ),
    ],
)
def test_one_response_is_greedy_and_several_are_sampled_unless_a_temperature_is_given(
    settings, sampling
):
    assert load_eval("toy:student", [DATA, *settings]).sampling == sampling


@pytest.mark.parametrize(
    ("model", "settings", "says"),
    [
        ("toy:student", [], "eval: needs problems: --data PATH"),
        (
            "toy:studnet",
            [DATA],
            "student.model = 'toy:studnet': must be 'toy:student' or 'toy:teacher'; did you mean",
        ),
        ("no/such/model", [DATA], "student.model = 'no/such/model': no such file or folder"),
        ("toy:student", ["data.path=rows.csv"], "data.path = 'rows.csv': no such file or folder"),
        ("toy:student", [DATA, "rollout.temprature=1"], "did you mean 'rollout.temperature'?"),
        (
            "toy:student",
            [DATA, "rollout.truncated=mask"],
            "rollout.truncated = 'mask': no such setting",
        ),
        ("toy:student", [DATA, "learner.lr=1e-4"], "learner: no such section"),
        ("toy:student", [DATA, "k=0"], "k = 0: must be an integer >= 1"),
        (
            "toy:student",
            [DATA, "k=4", "rollout.samples_per_prompt=2"],
            "samples_per_prompt = 2: must be >= k = 4",
        ),
        (
            "toy:student",
            [DATA, "k=4", "rollout.temperature=0"],
            "must be 1 at rollout.temperature = 0",
        ),
        (
            "toy:student",
            [DATA, "rollout.top_p=0.9"],
            "rollout.top_p = 0.9: must be 1 at rollout.temperature = 0",
        ),
        (
            "toy:student",
            [DATA, "rollout.max_new_tokens=257"],
            "rollout.max_new_tokens = 257: must be <= 256",
        ),
        (
            "toy:student",
            [DATA, "verify.check=maths"],
            "verify.check = 'maths': must be 'choice', 'code', 'exact', 'math', 'math_verify',",
        ),
        (
            "toy:student",
            [DATA, "verify.tolerance=0.01"],
            "verify.tolerance = 0.01: is of verify.check = 'numeric', not 'math'",
        ),
        ("toy:student", [DATA, "run.dir=."], "run.dir = '.': holds the working directory"),
    ],
)
def test_a_mistake_is_named_before_anything_starts(model, settings, says):
    with pytest.raises(ConfigError) as refused:
        load_eval(model, settings)
    assert says in str(refused.value)


def test_training_has_no_top_p():
    from async_opd.cli.demo import CONFIG
    from async_opd.config.load import load

    with pytest.raises(ConfigError, match=r"rollout.top_p = 0.9: no such setting"):
        load(CONFIG, ["rollout.top_p=0.9"])


@pytest.fixture
def adapter(tmp_path):
    """A folder as peft writes it, of the shipped student."""

    def adapter(base=str(STUDENT)):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
        return str(tmp_path)

    return adapter


def test_an_adapter_is_evaluated_by_the_context_of_the_model_that_it_is_of(adapter):
    assert load_eval(adapter(), [DATA]).student.model == adapter()
    with pytest.raises(ConfigError) as raised:
        load_eval(adapter(), [DATA, "rollout.max_new_tokens=100000"])
    assert "rollout.max_new_tokens = 100000: must be <= " in f"{raised.value}"


def test_an_adapter_of_what_is_not_there_is_refused_by_both_names(adapter):
    with pytest.raises(ConfigError) as raised:
        load_eval(adapter("/no/model"), [DATA])
    said = f"the base of student.model = '{adapter()}' = '/no/model': no such file or folder"
    adapter("/no/model")
    assert f"{raised.value}".startswith(said)


def test_an_evaluation_trains_no_adapter():
    with pytest.raises(ConfigError, match=r"^student\.lora: trains an adapter, and an evaluation"):
        load_eval("toy:student", [DATA, "student.lora.rank=8"])


@pytest.mark.parametrize("key", ["student.model", "teacher.model"])
def test_training_begins_at_a_whole_model(adapter, key):
    with pytest.raises(ConfigError) as raised:
        load("configs/demo.toml", [f"{key}={adapter()}"])
    assert f"{raised.value}" == (
        f"{key} = '{adapter()}': is an adapter of '{STUDENT}', and no whole model; `async-opd"
        " export RUN --merged` writes one"
    )
