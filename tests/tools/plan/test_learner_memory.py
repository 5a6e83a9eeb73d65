"""The estimate of a learner rank against what one allocates, on CPU."""

import json
import subprocess
import sys

import pytest

from async_opd.config.sections import SyncConfig
from async_opd.roles.learner.config import LearnerConfig
from async_opd.tools.plan import memory
from async_opd.tools.plan.shape import read

SIZES = dict(
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=1024,
    num_hidden_layers=4,
    num_attention_heads=4,
    max_position_embeddings=1024,
    tie_word_embeddings=True,
)
TOLERANCE = 0.05


@pytest.mark.ray
def test_a_rank_holds_and_allocates_what_is_estimated(tiny_lm, tmp_path):
    """Between two steps, at the most of a backward of many tokens, and at the most of an update
    after few."""
    model = tiny_lm("Qwen3", **SIZES)
    model.save_pretrained(tmp_path)
    settings, tokens = dict(zero_stage=1, dtype="bfloat16", head_chunk_rows=64), [16, 1024]
    job = dict(model=str(tmp_path), settings=settings, tokens=tokens)
    script = [sys.executable, "-m", "tests.tools.plan.learner_memory", json.dumps(job)]
    ran = subprocess.run(script, capture_output=True, text=True, timeout=100)
    assert ran.returncode == 0, ran.stderr
    measured = json.loads(ran.stdout.splitlines()[-1])

    def estimate(length: int) -> memory.Memory:
        config = LearnerConfig(
            trajectories_per_step=1, lr=1e-4, micro_batch_tokens=length, **settings
        )
        return memory.learner(
            config, read(model.config.to_dict(), "student.model"), SyncConfig(backend="gloo")
        )

    few, many = map(estimate, tokens)
    between = few.parts["weights"] + few.parts["gradients"] + few.parts["optimizer"]
    assert measured["held"] == pytest.approx(between, rel=TOLERANCE)
    assert (
        few.either["update"] > few.either["backward"]
        and many.either["backward"] > many.either["update"]
    )
    for peak, estimated in zip(measured["peaks"], (few, many), strict=True):
        assert measured["held"] + peak == pytest.approx(estimated.total, rel=TOLERANCE)
