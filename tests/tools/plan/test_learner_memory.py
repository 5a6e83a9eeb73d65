"""The estimate of a learner rank, one of two, against what it allocates, on CPU."""

import json
import subprocess
import sys

import pytest

from async_opd.config.sections import SyncConfig
from async_opd.core.wire import Needs
from async_opd.roles.learner.config import LearnerConfig
from async_opd.tools.plan import memory
from async_opd.tools.plan.passes import Packed
from async_opd.tools.plan.shape import read

SIZES = dict(
    vocab_size=2048,
    hidden_size=256,
    intermediate_size=1024,
    num_hidden_layers=4,
    num_attention_heads=4,
    max_position_embeddings=1024,
    tie_word_embeddings=True,
)
COMMON = dict(trajectories_per_step=2, ranks=2, head_chunk_rows=64)
CASES = [
    COMMON | case
    for case in (
        dict(zero_stage=0, dtype="float32"),
        dict(zero_stage=1, dtype="bfloat16"),
        dict(zero_stage=2, dtype="bfloat16"),
        dict(zero_stage=3, dtype="bfloat16"),
        dict(zero_stage=2, dtype="bfloat16", offload_optimizer=True),
    )
]
TOKENS = [16, 1024]  # of which the update, and the backward, takes the most
REDUCED = 300_000
TOLERANCE = 0.05


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_a_rank_holds_and_allocates_what_is_estimated(tiny_lm, tmp_path, monkeypatch):
    """Between two steps, at the most of a backward of many tokens, and at the most of an update
    after few. On a CPU what is offloaded counts with the rest."""
    monkeypatch.setattr(memory, "REDUCED", REDUCED)
    model = tiny_lm("Qwen3", **SIZES)
    model.save_pretrained(tmp_path)
    shape = read(model.config.to_dict(), "student.model")
    job = dict(model=str(tmp_path), cases=CASES, tokens=TOKENS, reduced=REDUCED)
    script = [sys.executable, "-m", "tests.tools.plan.learner_memory", json.dumps(job)]
    ran = subprocess.run(script, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    rows = [line.split(" ", 1)[1] for line in ran.stdout.splitlines() if line[:9] == "measured "]
    for case, row in zip(CASES, map(json.loads, rows), strict=True):

        def estimate(length: int, case: dict = case) -> memory.Memory:
            config = LearnerConfig(lr=1e-4, micro_batch_tokens=length, **case)
            batch = Packed(tokens=length, places=length, padded=True)
            return memory.learner(config, shape, SyncConfig(backend="gloo"), batch, Needs())

        few, many = map(estimate, TOKENS)
        whole = memory.element(case["dtype"]) * shape.parameters
        offloaded = few.host - whole - 2 * SyncConfig().bucket_mib * 2**20
        if case.get("offload_optimizer"):  # the step's own memory is the host's, and not estimated
            assert row["held"] == pytest.approx(sum(few.parts.values()) + offloaded, rel=TOLERANCE)
            continue
        assert few.either["update"] > few.either["backward"]
        assert many.either["backward"] > many.either["update"]
        for peak, estimated in zip(row["peaks"], (few, many), strict=True):
            assert row["held"] + peak == pytest.approx(estimated.total, rel=TOLERANCE), case
