"""Recorded rollouts for the page: each token with the classes that colour it, and its numbers."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from async_opd.telemetry.rollout_log import TOKENS  # of one rollout, on the page
from async_opd.tools.report.read import Run

LEVELS = 4  # of a colour
NUMBERS = {  # what is shown of a token, where it was recorded
    "student": "log π student",
    "behaviour": "log π behaviour",
    "teacher": "log π teacher",
    "reference": "log π reference",
    "advantage": "advantage",
    "weight": "weight",
    "ratio": "ratio ρ̃",
    "coefficient": "coefficient",
    "selected": "selected",
    "version": "version",
    "kv_lag": "lag of its KV",
    "teacher_entropy": "teacher's entropy",
    "student_entropy": "student's entropy",
}
TEXTS = {  # what is no number of a token
    "step",
    "id",
    "prompt",
    "prompt_tokens",
    "prompt_cut",
    "teacher_prompt",
    "tokens",
    "cut",
    "truncated",
    "reward",
    "correct",
    "kept_kv",
}


@dataclass
class Rollout:
    """One recorded response for the template."""

    run: str
    step: int
    id: str
    prompt: str
    prompt_cut: int
    teacher_prompt: str  # where the teacher was shown another, else ""
    verdict: str
    tokens: list[tuple[str, str]]  # classes, text
    left_out: int  # tokens behind those
    truncated: bool
    signal: str  # what stands for the advantage
    # from which size on a colour is the strongest: of `signal` and of `weight`
    strongest: dict[str, float]
    uniform: bool  # every token weighs the same, and all are selected
    numbers: dict[str, list[float | None]]  # by name, for the script


def rollouts(run: Run) -> list[Rollout]:
    """Show what was recorded, with colours by one scale for all of the run. A line that is none is
    named and left out."""
    recorded = []
    for line in run.rollouts:
        try:
            recorded.append((line, _numbers(line)))
        except (KeyError, TypeError, ValueError, OverflowError) as e:
            run.remarks.append(
                f"samples.jsonl: a line without what it needs: left out ({type(e).__name__}: {e})"
            )
    scales = {
        name: _scale([numbers[name] for _, numbers in recorded if name in numbers])
        for name in ("signal", "weight")
    }
    return [_rollout(run, line, numbers, scales) for line, numbers in recorded]


def _numbers(line: dict[str, Any]) -> dict[str, np.ndarray]:
    """Take the per-token numbers of a line by name; `signal` is the advantage, or the teacher's
    log-prob above the student's."""
    count = min(len(line["tokens"]), TOKENS)
    numbers = {
        name: np.array(column[:count], float)
        if isinstance(column, list)
        else np.full(count, column, float)  # they are all alike
        for name, column in line.items()
        if name not in TEXTS and isinstance(column, list | int | float | None)
    }
    if wrong := [name for name, column in numbers.items() if column.shape != (count,)]:
        raise ValueError(f"{', '.join(wrong)}: not a number a token")
    numbers["signal"] = (
        numbers["advantage"] if "advantage" in numbers else numbers["teacher"] - numbers["student"]
    )
    return numbers


def _scale(columns: list[np.ndarray]) -> float:
    """Choose the size that has the strongest colour: that of the 95th per cent."""
    sizes = np.abs(np.concatenate([np.ones(0), *columns]))
    sizes = sizes[np.isfinite(sizes)]
    return float(np.quantile(sizes, 0.95)) or 1.0 if len(sizes) else 1.0


def _rollout(
    run: Run, line: dict[str, Any], numbers: dict[str, np.ndarray], scales: dict[str, float]
) -> Rollout:
    count = len(numbers["signal"])
    weight = numbers.get("weight", np.ones(count))
    selected = numbers.get("selected", np.ones(count))
    classes = [
        f"a{_level(numbers['signal'][i], scales['signal'])} w{_level(weight[i], scales['weight'])}"
        f" {_choice(numbers, i, selected[i])}"
        for i in range(count)
    ]
    signal = "advantage" if "advantage" in numbers else "teacher − student"
    others = [name for name in numbers if name not in {*NUMBERS, "signal", "kept"}]
    labels = NUMBERS | {name: name.replace("_", " ") for name in others} | {"signal": signal}
    return Rollout(
        run=run.name,
        step=int(line["step"]),
        id=str(line["id"]),
        prompt=str(line["prompt"]),
        prompt_cut=int(line.get("prompt_cut", 0)),
        teacher_prompt=line.get("teacher_prompt", ""),
        verdict=_verdict(line.get("reward", line.get("correct"))),  # which runs before 0 to 1 have
        tokens=list(zip(classes, map(_visible, line["tokens"]), strict=False)),
        left_out=len(line["tokens"]) - count + int(line.get("cut", 0)),
        truncated=bool(line.get("truncated")),
        signal=signal,
        strongest=scales,
        uniform=bool(np.ptp(weight) == 0 and selected.all() and "agree" not in numbers),
        numbers={label: _plain(numbers[name]) for name, label in labels.items() if name in numbers},
    )


def _verdict(reward: float | None) -> str:
    """Put a reward into words: that of a right or a wrong response, or a number between."""
    if reward is None:
        return "unknown"
    return {1.0: "right", 0.0: "wrong"}.get(reward, f"reward {reward:.4g}")


def _level(value: float, scale: float) -> str:
    """Write the strength of a colour as "3", or "n3" below zero; "0" only for what is nothing."""
    if not math.isfinite(value) or value == 0:
        return "0"
    return ("n" if value < 0 else "") + str(min(LEVELS, math.ceil(LEVELS * abs(value) / scale)))


def _choice(numbers: dict[str, np.ndarray], place: int, selected: float) -> str:
    """Tell of a method that selects: in or out. Of one that asks whether teacher and verifier
    agree: yes, no or neither."""
    if not selected:
        return "out"
    if "agree" in numbers and "disagree" in numbers:
        return (
            "yes" if numbers["agree"][place] else "no" if numbers["disagree"][place] else "neither"
        )
    return "in"


def _visible(piece: Any) -> str:
    """Show a token's text where nothing would be seen of it."""
    text = str(piece)
    return text.replace("\n", "↵\n").replace("\t", "⇥\t") if text else "◌"


def _plain(column: np.ndarray) -> list[float | None]:
    return [float(f"{x:.4g}") if math.isfinite(x) else None for x in column.tolist()]
