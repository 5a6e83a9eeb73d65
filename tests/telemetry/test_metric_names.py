"""The table of metrics against what is emitted. What only DeepSpeed knows is held against it in
tests/e2e."""

import asyncio
import re
from pathlib import Path

import msgspec
import pytest

from async_opd.objectives.freshness import Freshness
from async_opd.objectives.reward import Reward
from async_opd.objectives.sampled import Importance
from async_opd.telemetry import metric_names
from async_opd.telemetry.metric_names import NAMES
from tests.driver.test_filter import run as run_filtered
from tests.driver.test_scoring_learner import Scoring, inside
from tests.driver.test_teacher_sampling import run as run_taught
from tests.driver.test_train_loop import run
from tests.objectives.test_contract import PLAIN, WHOLE, accumulated, packed
from tests.simulated.roles import SimulatedTeacher

FROM_DEEPSPEED = {"lr", "grad_norm"}


@pytest.fixture
def emitted(tmp_path) -> set[str]:
    """Keys of the rows of runs with every role there can be, and of every objective's metrics."""
    (tmp_path / "taught").mkdir()
    (tmp_path / "scoring").mkdir()
    _, _, scoring = asyncio.run(inside(tmp_path / "scoring", learner=Scoring()))
    keys = set().union(*run_taught(tmp_path / "taught").rows, *scoring)
    bounded = msgspec.structs.replace(PLAIN[0], signal_at_most=1.0, weight_at_most=1.0)
    rewarded = msgspec.structs.replace(PLAIN[0], reward=Reward())
    fresh = msgspec.structs.replace(PLAIN[0], freshness=Freshness())
    narrowing = Importance(ratio="prefix_normalised", narrowing=(0.3, 0.5))
    gated = msgspec.structs.replace(PLAIN[0], correction=narrowing)
    for objective in (*PLAIN, bounded, rewarded, fresh, gated):
        keys |= accumulated(objective, packed(objective, WHOLE))[0].keys()
    return keys


@pytest.fixture
def emitted_of_sources(tmp_path) -> set[str]:
    """Keys of the rows of a run over several data sets, with a filter."""
    (tmp_path / "filtered").mkdir()
    _, _, rows = run_filtered(tmp_path / "filtered", steps=2, sources=("one", "two"), tries=1)
    return set().union(*rows)


async def test_every_key_of_a_row_is_in_the_table_and_every_entry_is_emitted(
    tmp_path, emitted, emitted_of_sources
):
    _, _, rows = await run(
        tmp_path, "eval.every_steps=1", references=[SimulatedTeacher()], held_out=2
    )
    keys = emitted.union(emitted_of_sources, *rows)
    assert {
        "tokens_lag_0",
        "reference_busy",
        "teacher_generators_down",
        "uncertain",
        "taught",
    } <= keys
    assert {metric_names.of(key).name for key in keys} == {
        metric.name for metric in NAMES
    } - FROM_DEEPSPEED


def test_a_key_that_is_in_no_entry_is_named():
    with pytest.raises(
        KeyError, match=r"tokens_lag_x: not in async_opd/telemetry/metric_names\.py"
    ):
        metric_names.of("tokens_lag_x")


def test_an_entry_stands_for_one_thing():
    names = [metric.name for metric in NAMES]
    assert len(names) == len(set(names))
    # Ray's metrics take no other letters
    assert all(metric.meaning and metric.meaning.isascii() for metric in NAMES)


def test_the_page_has_the_unit_and_the_meaning_of_every_key():
    page = Path(metric_names.__file__).with_name("METRICS.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.+) \|$", page, re.MULTILINE)
    listed = [(name, unit, meaning.replace("\\|", "|")) for name, unit, meaning in rows]
    assert listed == [tuple(metric) for metric in NAMES], (
        "run: python -m async_opd.telemetry.metric_names"
    )
