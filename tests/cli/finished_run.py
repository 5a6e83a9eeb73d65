"""A run directory with every file that a command reads, as training leaves them."""

import json
import shutil
from pathlib import Path

import msgspec

from async_opd.cli.demo import CONFIG as DEMO
from async_opd.config.load import load
from async_opd.core.run_dir import (
    CONFIG,
    EARLIER_SPANS,
    ENVIRONMENT,
    EVENTS,
    LEDGER,
    METRICS,
    SAMPLES,
    SPANS,
    SUMMARY,
)
from async_opd.driver.checkpoints import Checkpoints, RunState
from async_opd.toy import STUDENT

STATES = ("busy", "starved", "blocked", "syncing", "down")
ROLES = ("generators", "teachers", "verifier", "learner")


def write_lines(file: Path, rows: list) -> None:
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def finished_run(folder: Path, steps: int = 6) -> Path:
    """Make the run directory `folder` of a run that has ended, a group a step, with the checkpoint
    of its last step."""
    folder.mkdir(parents=True)
    overrides = [
        f"run.steps={steps}",
        "learner.warmup_steps=0",
        "learner.trajectories_per_step=4",
        "rollout.samples_per_prompt=4",
    ]
    content = msgspec.json.encode(load(DEMO, [*overrides, f"run.dir={folder.name}"]))
    (folder / CONFIG).write_bytes(content)
    (folder / ENVIRONMENT).write_text('{"commit": "abc123", "versions": {"torch": "2.13.0"}}')
    write_lines(folder / METRICS, [_row(step) for step in range(1, steps + 1)])
    (folder / SUMMARY).write_text(
        json.dumps(
            {"version": steps, "accuracy_before": 0.25, "accuracy_after": 0.75}
            | {"eval_problems": 64, "dropped_stale": 3, "trained_tokens_per_s": 812.0}
            | {"teacher_accuracy": 0.9, "restarts": 0, "scored_dropped": 1, "max_lag_seen": 2}
        )
    )
    lost = {"time": 3.5, "step": 2, "who": "generator 0", "what": "lost", "why": "it died"}
    write_lines(folder / EVENTS, [lost])
    write_lines(folder / SAMPLES, [_sample(step) for step in (1, steps)])
    write_lines(folder / EARLIER_SPANS, [_span(step) for step in range(1, steps // 2)])
    write_lines(folder / SPANS, [_span(step) for step in range(steps // 2, steps + 1)])
    records = [
        record
        for step in range(1, steps + 1)
        for record in (["out", f"{step}@0"], ["trained", step, [f"{step}@0"]])
    ]
    records += [["checkpoint", steps], ["finished"]]
    write_lines(folder / LEDGER, [[kind, n, *rest] for n, (kind, *rest) in enumerate(records, 1)])
    checkpoints = Checkpoints(folder, keep=1)
    begun = checkpoints.begin(steps)
    shutil.copytree(STUDENT, begun / "model")
    (begun / "learner").mkdir()
    (begun / "learner" / "rank0.pt").write_bytes(b"state")
    counters = {"before": [30, 20, 120], "dropped": {}}
    checkpoints.commit(
        steps, RunState(version=steps, position={}, outstanding=[], score=0.5, counters=counters)
    )
    return folder


def _row(step: int) -> dict:
    shares = {f"{role}_{state}": 0.2 for role in ROLES for state in STATES}
    rates = {f"{role}_tokens_per_s": 900.0 for role in ("generators", "teachers", "trained")}
    return {
        "step": step,
        "elapsed_s": 2.0 * step,
        "tokens": 3000.0,
        "lag_max": 1.0,
        "loss": 1 / step,
        "kl": 2 / step,
        "entropy": 0.5,
        "accuracy": 0.5 if step % 2 else None,
        "queue_ready": step % 5,
        "queue_outstanding": 4,
        **shares,
        **rates,
    }


def _sample(step: int) -> dict:
    return {
        "step": step,
        "id": f"{step}@0",
        "prompt": "1+2=",
        "prompt_cut": 0,
        "tokens": ["3", "."],
        "cut": 0,
        "truncated": False,
        "reward": 1.0,
        **{name: [-0.5, -0.25] for name in ("student", "behaviour", "teacher", "advantage")},
        "selected": [0, 1],
        "weight": [0.5, 1.0],
    }


def _span(step: int) -> dict:
    """The line of the second before `step`."""
    return {
        "step": step,
        "epoch": 0.0,
        "since": step - 1.0,
        "until": float(step),
        "lanes": {"generator 0": "busy", "learner": "starved"} if step > 1 else {},
        "states": [["generator 0", "busy", step - 0.9], ["learner", "busy", step - 0.2]],
        "calls": [
            ["generator 0", "generate", f"{step}@0", step - 0.9, step - 0.5],
            ["learner", "step", [f"{step}@0"], step - 0.2, step - 0.1],
        ],
        "counters": {"queue_ready": 1, "lag_max": 1.0},
    }
