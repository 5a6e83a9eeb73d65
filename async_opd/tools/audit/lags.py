"""Lags that a run has written, held against the versions of recorded tokens and the bound."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from async_opd.config.schema import Config
from async_opd.core.run_dir import EARLIER_SAMPLES, METRICS, SAMPLES
from async_opd.maths.lag import kv_lag
from async_opd.telemetry.rollout_log import TOKENS
from async_opd.tools.audit.rows import Row, Sample, read_rows

ROUNDED = 6e-3  # of the largest number of a column: three digits are kept
Column = list[float | None] | float | None


class StepLags(Row):
    """Of a row of metrics.jsonl."""

    lag_max: float | None = None
    kv_lag_mean: float | None = None


class RecordedLags(Sample):
    """Of a recorded trajectory; one of an earlier version of the program has no `prompt_tokens`."""

    tokens: tuple[str, ...] = ()
    prompt_tokens: int | None = None
    version: Column = None  # that sampled each token
    kept: Column = 1  # whether it is in the loss
    kept_kv: bool = False
    kv_lag: Column = 0  # mean over what the token attended to


def lags(run_dir: Path, config: Config | None) -> Iterator[str]:
    """Say which lags cannot be: of recorded tokens, by the versions that sampled them and by the
    row of their step; of rows, by the bound and `sync.kv` of `config`, None for a run that may have
    had others before."""
    largest: dict[int, tuple[float, float]] = {}  # of a step's recorded tokens: lag, and KV's
    for file in (run_dir / EARLIER_SAMPLES, run_dir / SAMPLES):
        for sample in read_rows(file, RecordedLags, []) if file.exists() else ():
            if sample.prompt_tokens is None or sample.version is None or not sample.tokens:
                continue
            version_T = _column(sample.version, sample)
            kept_T, kv_lag_T = _column(sample.kept, sample) == 1, _column(sample.kv_lag, sample)
            if wrong := _wrong(sample, version_T, kv_lag_T):
                yield f"samples.jsonl: {sample.id} of step {sample.step}: {wrong}"
                continue
            before = largest.get(sample.step, (0.0, 0.0))
            lag_T = sample.step - 1 - version_T
            largest[sample.step] = (
                max(before[0], float(lag_T[kept_T].max(initial=0))),
                max(before[1], float(kv_lag_T[kept_T].max(initial=0))),
            )
    file = run_dir / METRICS
    for row in read_rows(file, StepLags, []) if file.exists() else ():
        lag, of_kv = largest.get(row.step, (0.0, 0.0))
        yield from (f"metrics.jsonl: step {row.step}: {why}" for why in _of_row(row, lag, of_kv))
        if config:
            yield from _against(row, config)


def _of_row(row: StepLags, lag: float, of_kv: float) -> Iterator[str]:
    """Say where a row knows of less than the recorded tokens of its step show."""
    if row.lag_max is not None and row.lag_max < lag:
        yield f"lag_max = {row.lag_max:g}, but a recorded token that was trained has {lag:g}"
    if row.kv_lag_mean == 0 and of_kv > 0:
        yield f"kv_lag_mean = 0, but a recorded token that was trained has {of_kv:g}"


def _against(row: StepLags, config: Config) -> Iterator[str]:
    """Say where a row breaks what the config promises."""
    bound = config.run.max_lag_steps
    if row.lag_max is not None and row.lag_max > bound:
        yield (
            f"metrics.jsonl: step {row.step}: lag_max = {row.lag_max:g}, run.max_lag_steps ="
            f" {bound}"
        )
    if row.kv_lag_mean and config.sync.kv == "recompute":
        yield (
            f"metrics.jsonl: step {row.step}: kv_lag_mean = {row.kv_lag_mean:g}, sync.kv ="
            " 'recompute'"
        )


def _wrong(
    sample: RecordedLags, version_T: npt.NDArray[np.float64], kv_lag_T: npt.NDArray[np.float64]
) -> str:
    """Say what cannot be in a sample; "" where all can. NaN is what is no number."""
    count = min(len(sample.tokens), TOKENS)
    both = np.concatenate([version_T, kv_lag_T])
    if version_T.shape != kv_lag_T.shape or len(both) != 2 * count or np.isnan(both).any():
        return "not a version and a lag for each token"
    if (np.diff(version_T) < 0).any() or version_T[0] < 0:
        return "its tokens are in another order than the weights that sampled them"
    if version_T[-1] > sample.step - 1:
        return f"sampled by version {version_T[-1]:g}, which came after it was trained"
    prompt_tokens = sample.prompt_tokens or 0
    expected_T = (
        kv_lag(version_T.astype(np.int32), prompt_tokens)
        if sample.kept_kv
        else np.zeros(count, np.float32)
    )
    off_T = np.abs(kv_lag_T - expected_T)
    if not (off_T <= ROUNDED * expected_T.max()).all():
        worst = int(off_T.argmax())
        read, expected = kv_lag_T[worst], expected_T[worst]
        return f"token {worst}: kv_lag = {read:g}, by its versions {expected:.3g}"
    return ""


def _column(values: Column, sample: RecordedLags) -> npt.NDArray[np.float64]:
    """Write a column out: one number stands for as many as there are tokens."""
    if isinstance(values, list):
        return np.array(values, float)
    return np.full(min(len(sample.tokens), TOKENS), values, float)
