"""What looking at two responses of a step costs the learner: the step with `roles.learner.recorder`
and without, in turns.

96 responses of 40 tokens of the demo's student, fp32, one thread, medians; a run looks at every
tenth step by default.

    python benchmarks/recording.py --out recording.json [--repeat 15]
"""

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from async_opd import toy
from async_opd.core.wire import Prompt, Rollout, Scores, Span, Verdict
from async_opd.launch.new_run import environment
from async_opd.objectives import all_objectives
from async_opd.objectives.base import Objective
from async_opd.roles.learner.batch import TrainingBounds, Trajectory, pack
from async_opd.roles.learner.recorder import Recorder
from async_opd.roles.learner.step import StepContext, Student, accumulate
from async_opd.roles.models import causal_lm

RESPONSES, TOKENS, SEED = 96, 40, 0
TAGS = ("opd", "sg_opd", "dear")


def trajectories() -> list[Trajectory]:
    random = np.random.default_rng(SEED)
    found = []
    for at in range(RESPONSES):
        logp, teacher_logp = random.uniform(-4, -0.1, (2, TOKENS)).astype(np.float32)
        ids, spans = (
            random.integers(10, size=TOKENS, dtype=np.int32),
            (Span(version=0, start=0, end=TOKENS),),
        )
        rollout = Rollout(
            id=f"{at}@0#0", ids=ids, behaviour_logp=logp, spans=spans, truncated=False
        )
        scores = Scores(id=rollout.id, sampled_logp=teacher_logp)
        verdicts = Verdict(id=rollout.id, reward=float(at % 2)), Verdict(id="other", reward=0.0)
        prompt = Prompt(id=f"{at}@0", ids=np.array([1, 2, 3], np.int32), answer="")
        found.append(
            Trajectory(
                prompt=prompt,
                rollout=rollout,
                scores=scores,
                verdicts=verdicts,
                group_lengths=(TOKENS, TOKENS),
                reference=scores,
            )
        )
    return found


def step(student: Student, objective: Objective, batch: list[Trajectory], look: bool) -> float:
    """Seconds of one forward and backward."""
    started = time.perf_counter()
    bounds = TrainingBounds(max_lag_steps=4, stale="mask", truncated="train", cap=64)
    micros = [pack(batch, bounds, live=0, device=torch.device("cpu"))]
    recorder = Recorder(objective, [batch], micros, 0) if look else None
    accumulate(
        student,
        torch.Tensor.backward,
        lambda values, op: None,
        objective,
        micros,
        StepContext(max_lag_steps=4),
        recorder and recorder.look,
    )
    student.zero_grad()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeat", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    student = Student(
        causal_lm.load(str(toy.STUDENT), "float32", torch.device("cpu")),
        temperature=1.0,
        chunk_rows=1024,
    )
    batch, rows = trajectories(), []
    for tag in TAGS:
        objective = all_objectives()[tag]()
        pairs = [
            [step(student, objective, batch, look) for look in (True, False)]
            for _ in range(args.repeat)
        ]
        looked, plain = map(statistics.median, zip(*pairs, strict=True))
        rows.append(
            {
                "objective": tag,
                "looked_ms": 1e3 * looked,
                "plain_ms": 1e3 * plain,
                "ratio": looked / plain,
            }
        )
        print(
            f"{tag:8} {1e3 * looked:7.1f} ms, without {1e3 * plain:7.1f} ms:"
            f" {looked / plain - 1:+.1%} of that step"
        )
    about = {
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores",
        "seed": SEED,
        **environment(),
    }
    args.out.write_text(json.dumps({"rows": rows, **about}, indent=2))


if __name__ == "__main__":
    main()
