"""Several data sets from the config to the prompts of a run."""

import json
from itertools import islice

import msgspec
import pytest
from msgspec.structs import replace

from async_opd.cli.demo import CONFIG as DEMO
from async_opd.config.load import load
from async_opd.core.errors import DataError
from async_opd.launch.inputs import read
from async_opd.launch.toy_models import resolve_toy
from async_opd.roles.rollout.config import SourceConfig
from async_opd.tools.plan.checks import rows


@pytest.fixture
def config(tmp_path):
    """Make the demo's config with two sets, of 3 and 1 parts, and held-out problems."""
    sets = {"short": ["1+1=", "2+2="], "long": ["33+33=", "44+44=", "55+55="]}
    for name, prompts in sets.items():
        lines = (
            json.dumps({"id": n, f"{name}_q": q, "answer": "1"}) for n, q in enumerate(prompts)
        )
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))

    def make(*overrides):
        made = load(DEMO, [f"run.dir={tmp_path}/run", "eval.problems=2", *overrides])
        sources = {
            name: SourceConfig(
                path=str(tmp_path / f"{name}.jsonl"), prompt=f"{name}_q", weight=weight
            )
            for name, weight in (("short", 3), ("long", 1))
        }
        return replace(made, data=replace(made.data, path="", sources=sources))

    return make


def test_a_run_reads_all_its_sets_and_held_out_problems_with_the_columns_of_data(config, tmp_path):
    inputs = read(resolve_toy(config(), tmp_path))
    ids = [prompt.id for prompt in islice(inputs.prompts, 8)]
    assert [sum(id.startswith(name) for id in ids) for name in ("short:", "long:")] == [6, 2]
    assert len(inputs.held_out) == 2 and "short" not in inputs.held_out[0].id
    inputs.prompts.close()


def test_a_set_with_fewer_rows_than_its_share_of_the_steps_is_named(config, tmp_path):
    # 16 prompts: 12 of the two rows, 4 of the three
    settings = ("run.steps=2", "learner.trajectories_per_step=8", "learner.warmup_steps=0")
    expected = (
        r"^data.epochs = 5: 5 x 2 rows of data\.sources\.short\.path, but run.steps = 2 needs 12$"
    )
    with pytest.raises(DataError, match=expected):
        read(resolve_toy(config(*settings, "data.epochs=5"), tmp_path))
    read(resolve_toy(config(*settings, "data.epochs=6"), tmp_path)).prompts.close()


@pytest.mark.parametrize("bad", ["short", "long"])
def test_a_plan_looks_at_the_rows_of_every_set(config, tmp_path, bad):
    rows(config())
    (tmp_path / f"{bad}.jsonl").write_text(json.dumps({"id": 0, f"{bad}_q": "", "answer": "1"}))
    with pytest.raises(DataError, match=rf"^data\.sources\.{bad}\.path = .*: row 0: '{bad}_q'"):
        rows(config())


def test_a_config_with_sources_survives_the_run_directory(config):
    made = config()
    assert msgspec.json.decode(msgspec.json.encode(made), type=type(made)) == made
