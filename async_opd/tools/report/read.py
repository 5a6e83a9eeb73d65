"""What a run directory says, read with tolerance: whatever is absent or damaged becomes a remark,
never an error."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from async_opd.core.errors import RunMissing
from async_opd.core.reading import content_of, refused
from async_opd.core.run_dir import (
    CONFIG,
    EARLIER_EVENTS,
    EARLIER_SAMPLES,
    ENVIRONMENT,
    EVENTS,
    LEDGER,
    METRICS,
    SAMPLES,
    SUMMARY,
    T,
    decode_row,
    read_lines,
)
from async_opd.core.suggest import beside

ROUTINE = ("placed", "saved")  # events of every run; checkpoints are in the ledger too
CHUNK = 1000  # rows that become numbers at once
LARGEST = 1e30  # number that is drawn
DEEPEST = 20  # sections of a config in one another that are told apart


@dataclass
class Run:
    """One run directory."""

    folder: Path
    name: str
    config: dict[str, str] = field(default_factory=dict)  # "learner.lr": "0.001"
    environment: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    # By key, float64 [steps], NaN where there is none.
    rows: dict[str, np.ndarray] = field(default_factory=dict)
    events: list[dict] = field(default_factory=list)  # but those of ROUTINE
    checkpoints: list[int] = field(default_factory=list)  # steps
    rollouts: list[dict] = field(default_factory=list)  # some of those in SAMPLES
    remarks: list[str] = field(default_factory=list)

    def times(self, steps: np.ndarray) -> np.ndarray:
        """Return the seconds of training after which `steps` were done."""
        return np.interp(steps, self.rows["step"], self.rows["seconds"])


def read(folder: Path, name: str, rollouts: int) -> Run:
    """Read the run in `folder` with at most so many `rollouts`. Raises RunMissing where there is
    none, or not a step yet."""
    with refused(f"{folder}", RunMissing):
        if not folder.is_dir():
            raise RunMissing(
                f"{folder}: no such folder{beside(folder)}; a report needs the directory of a run"
            )
        return _run(folder, name, rollouts)


def _run(folder: Path, name: str, rollouts: int) -> Run:
    run = Run(folder, name)
    if not (folder / METRICS).is_file():
        raise RunMissing(
            f"{folder}: no {METRICS} in it: it is no run directory, or no step is done yet"
        )
    run.config = dict(_flat(_json(run, CONFIG)))
    run.environment = _made_with(_json(run, ENVIRONMENT))
    summary = _json(run, SUMMARY, "the run has not ended")
    run.summary = {key: value for key, value in summary.items() if _is_number(value)}
    run.rows = _columns(row for row in _records(run, METRICS) if _is_number(row.get("step")))
    if not len(run.rows.get("step", ())):
        raise RunMissing(f"{folder}: {METRICS} holds no row with a step")
    run.rows["seconds"] = _since_the_start(run.rows.get("elapsed_s", run.rows["step"] * np.nan))
    files = [file for file in (EARLIER_EVENTS, EVENTS) if (folder / file).is_file()]
    run.events = [
        event if _is_number(event.get("step")) else event | {"step": None}
        for file in files
        for event in _records(run, file)
        if event.get("what") not in ROUTINE
    ]
    run.checkpoints = _checkpoints(folder / LEDGER)
    _read_rollouts(run, rollouts)
    return run


def _json(run: Run, file: str, absent: str = "left out") -> dict[str, Any]:
    try:
        tree = json.loads(content_of(run.folder / file).decode())
        if isinstance(tree, dict):
            return tree
        run.remarks.append(f"{file} is no JSON object: left out")
    except FileNotFoundError:
        run.remarks.append(f"{file} is not there: {absent}")
    except OSError as e:
        run.remarks.append(f"{file} cannot be read: left out ({e.strerror})")
    except (ValueError, RecursionError) as e:
        run.remarks.append(f"{file} is not JSON: left out ({e})")
    return {}


def _made_with(tree: dict[str, Any]) -> dict[str, Any]:
    """Take commit and versions of a run's environment, as far as they are what they should be."""
    commit, versions = tree.get("commit"), tree.get("versions")
    return {
        "commit": commit if isinstance(commit, str) else None,
        "versions": {name: f"{version}" for name, version in versions.items()}
        if isinstance(versions, dict)
        else {},
    }


def _flat(tree: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(tree, dict) and tree and path.count(".") < DEEPEST:
        for key, value in tree.items():
            yield from _flat(value, f"{path}.{key}" if path else key)
    else:
        yield path, json.dumps(tree) if not isinstance(tree, str) else tree


def _lines(run: Run, file: str, decode: Callable[[bytes], T]) -> Iterator[tuple[int, T]]:
    """Read each line that `decode` takes, with the offset behind it; the others are named."""
    damaged: list[int] = []
    yield from read_lines(
        run.folder / file, decode, lambda number, _: damaged.append(number), damaged.append
    )
    if damaged:
        more = f" and {len(damaged) - 5} more" if len(damaged) > 5 else ""
        many = "lines" if len(damaged) > 1 else "line"
        run.remarks.append(
            f"{file}: {many} {', '.join(map(str, damaged[:5]))}{more} damaged: left out"
        )


def _records(run: Run, file: str) -> Iterator[dict[str, Any]]:
    return (record for _, record in _lines(run, file, decode_row))


def _columns(records: Iterator[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Collect the numbers of all `records` by key; whatever else there is, and what is too large to
    be drawn, counts as absent."""
    parts: dict[str, list[tuple[int, np.ndarray]]] = {}
    count = 0
    for keys, alike in groupby(records, tuple):
        while chunk := [[*record.values()] for record in islice(alike, CHUNK)]:
            for key, values in zip(keys, _numbers(chunk).T, strict=True):
                parts.setdefault(key, []).append((count, values))
            count += len(chunk)
    columns = {key: np.full(count, np.nan) for key in parts}
    for key, chunks in parts.items():
        for start, values in chunks:
            columns[key][start : start + len(values)] = np.where(
                np.abs(values) < LARGEST, values, np.nan
            )
    return columns


def _numbers(rows: list[list[Any]]) -> np.ndarray:
    try:
        return np.array(rows, float)  # None becomes NaN
    except (TypeError, ValueError, OverflowError):
        return np.array([[x if _is_number(x) else np.nan for x in row] for row in rows], float)


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) and abs(x) < LARGEST


def _since_the_start(elapsed: np.ndarray) -> np.ndarray:
    """Count seconds of training over all starts: each begins anew."""
    before = np.where(np.diff(elapsed, prepend=0) < 0, np.roll(elapsed, 1), 0)
    return elapsed + np.cumsum(before)


def _checkpoints(ledger: Path) -> list[int]:
    """List the steps of all that were made, those among them that are deleted by now."""
    if not ledger.is_file():
        return []
    entries = (
        line.rstrip(b"]\n").split(b",")
        for _, line in read_lines(ledger, bytes)
        if line.startswith(b'["checkpoint"')
    )
    steps = (parts[2] for parts in entries if len(parts) == 3)
    return sorted({int(step) for step in steps if step.isdigit() and len(step) < 16})


class _Sample(msgspec.Struct):
    """Of a line of samples.jsonl: what every rollout on the page has."""

    step: int
    id: str
    prompt: str
    tokens: list[str]
    prompt_cut: int = 0
    teacher_prompt: str = ""
    cut: int = 0
    truncated: bool = False
    reward: float | None = None


def _read_rollouts(run: Run, most: int) -> None:
    """Choose evenly over the recorded steps, the first and the last among them. Of the others only
    what the page needs is decoded."""
    files = [file for file in (EARLIER_SAMPLES, SAMPLES) if (run.folder / file).is_file()]
    if not files:
        run.remarks.append(
            f"{SAMPLES} is not there: no rollouts to show (run.samples_every_steps records them)"
        )
        return
    decode = msgspec.json.Decoder(_Sample).decode
    ends = [(file, end) for file in files for end, _ in _lines(run, file, decode)]
    places = np.linspace(0, len(ends) - 1, min(most, len(ends))).round().astype(int)
    chosen = {ends[place] for place in places}
    run.rollouts = [
        msgspec.json.decode(line)
        for file in files
        for end, line in read_lines(run.folder / file, bytes)
        if (file, end) in chosen
    ]
