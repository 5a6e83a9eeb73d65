"""Which figures a page has, and the numbers of each."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from async_opd.objectives import all_objectives
from async_opd.objectives.base import COMPOSED
from async_opd.telemetry.metrics import ROLES, STATES, roles_of
from async_opd.tools.report.read import Run

POINTS = 240  # of a curve; a longer run is averaged
BARS = 60  # places of a stack
Bands = dict[str, tuple[str, str]]  # key of the rows: label and colour
# a figure of rows: title, what it shows, unit, labels by key
Curves = tuple[str, str, str, dict[str, str]]


@dataclass
class Series:
    """One curve, or one band of a stack."""

    label: str
    colour: str  # class of the style sheet
    dash: int  # style of the line
    step: np.ndarray
    seconds: np.ndarray
    mean: np.ndarray  # NaN: none there
    # lowest and highest of the rows that a point stands for
    spread: tuple[np.ndarray, np.ndarray] | None = None
    dots: bool = False  # a few points, each by itself


@dataclass
class Figure:
    """Curves over one pair of axes, or a stack."""

    title: str
    what: str
    unit: str  # "share", "nats", …
    series: list[Series]
    stacked: bool = False
    ends: tuple[float, float] = (1.0, 1.0)  # last step and second of all runs
    marks: list[tuple[str, float, float]] | None = None  # kind, step, seconds


LEARNING: tuple[Curves, ...] = (
    (
        "Accuracy",
        "Mean reward: the share of responses that are right",
        "share",
        {"accuracy": "training rollouts"},
    ),
    ("KL to the teacher", "Mean log π − log π teacher, sampled tokens", "nats", {"kl": "KL"}),
    ("Loss", "What the optimizer minimises", "", {"loss": "loss"}),
    ("Entropy", "Of the sampling policy, by its own tokens", "nats", {"entropy": "entropy"}),
    ("Length", "Mean tokens of a response", "tokens", {"length_mean": "length"}),
    ("Gradient", "Norm before clipping", "", {"grad_norm": "norm"}),
)
OFF_POLICY: tuple[Curves, ...] = (
    (
        "Mean weight",
        "Importance weight W · ρ̃ · |A| of the selected tokens",
        "",
        {"weight_mean": "mean"},
    ),
    ("Largest weight", "Of one token, in the step", "", {"weight_max": "max"}),
    (
        "Effective sample size",
        "Share of tokens that the weights leave in effect",
        "share",
        {"weight_ess": "weight", "ratio_ess": "ratio alone"},
    ),
    ("Selected tokens", "Share that the method trains on", "share", {"selected": "selected"}),
)
FLOW: tuple[Curves, ...] = (
    (
        "Throughput",
        "Tokens through each role",
        "tokens/s",
        {
            "generators_tokens_per_s": "generated",
            "teachers_tokens_per_s": "scored",
            "trained_tokens_per_s": "trained",
        },
    ),
    (
        "Queue",
        "Scored and waiting, and all that are out",
        "groups",
        {"queue_ready": "ready", "queue_outstanding": "outstanding"},
    ),
    ("Dropped", "Scored and never trained, so far", "trajectories", {"dropped": "dropped"}),
)


def learning(runs: list[Run]) -> list[Figure]:
    """Draw what the student learns, with what its objective shows."""
    figures = [_lines(runs, *curves) for curves in LEARNING]
    figures[0].series += [
        dots for place, run in enumerate(runs) if (dots := _held_out(run, place, len(runs) > 1))
    ]
    tags = {run.config.get("objective.tag", "") for run in runs}
    metrics = {
        name: name.replace("_", " ")
        for tag, objective in sorted(all_objectives().items())
        if tag in tags
        for name in objective.metrics
    } | {name: name.replace("_", " ") for composed in COMPOSED.values() for name in composed}
    figures.append(_lines(runs, "What the method shows", "Means over tokens", "", metrics))
    return _with_marks(figures, runs)


def off_policy(runs: list[Run]) -> list[Figure]:
    """Draw how old the trained tokens are and how the method weighs them."""
    return _with_marks(
        [*_stacks(runs, _lags), *(_lines(runs, *curves) for curves in OFF_POLICY)], runs
    )


def flow(runs: list[Run]) -> list[Figure]:
    """Draw what each role did with its time and how much went through."""
    return _with_marks([*_stacks(runs, _states), *(_lines(runs, *curves) for curves in FLOW)], runs)


def absent(runs: list[Run]) -> Iterator[str]:
    """Name the keys of the figures that a run's rows lack."""
    for run in runs:
        wanted = [key for *_, keys in (*LEARNING, *OFF_POLICY, *FLOW) for key in keys]
        if lacking := [key for key in wanted if key not in run.rows]:
            yield f"{run.name}: its rows have no {', '.join(lacking)}: left out"


def _lines(runs: list[Run], title: str, what: str, unit: str, keys: dict[str, str]) -> Figure:
    """Draw one curve a run and key. Colour tells the run, where there are several, and the style of
    the line the quantity."""
    several = len(runs) > 1
    most = POINTS if len(runs) <= 2 else POINTS // 2
    series = []
    for place, run in enumerate(runs):
        for dash, (key, label) in enumerate(keys.items()):
            if several:
                label = run.name if len(keys) == 1 else f"{run.name}, {label}"
            if key in run.rows and not np.isnan(run.rows[key]).all():
                colour = f"c{place if several else dash}"
                series.append(_curve(run, run.rows[key], label, colour, dash, most))
    return Figure(title, what, unit, series)


def _curve(run: Run, values: np.ndarray, label: str, colour: str, dash: int, most: int) -> Series:
    return Series(
        label=label,
        colour=colour,
        dash=dash,
        step=averaged(run.rows["step"], most),
        seconds=averaged(run.rows["seconds"], most),
        mean=averaged(values, most),
        spread=extremes(values, most) if len(values) > most else None,
    )


def _held_out(run: Run, place: int, several: bool) -> Series | None:
    """Draw the evaluations before, during and after training, by the version they belong to."""
    steps, shares = (run.rows.get(key, np.zeros(0)) for key in ("eval_version", "eval_accuracy"))
    known = {
        step: share
        for step, share in (
            (0.0, run.summary.get("accuracy_before")),
            (run.rows["step"][-1], run.summary.get("accuracy_after")),
            *zip(steps, shares, strict=False),
        )
        if isinstance(share, float) and not np.isnan(share)
    }
    if not known:
        return None
    step, share = (averaged(np.array(x), POINTS) for x in zip(*sorted(known.items()), strict=True))
    label = f"{run.name}, held-out" if several else "held-out"
    return Series(label, f"c{place if several else 1}", 0, step, run.times(step), share, dots=True)


def _stacks(
    runs: list[Run], bands_of: Callable[[Run], Iterator[tuple[str, str, Bands]]]
) -> Iterator[Figure]:
    """Draw shares that add up to one, over one another: a figure a run, so that they stay apart."""
    for run in runs:
        for title, what, bands in bands_of(run):
            title = f"{title}, {run.name}" if len(runs) > 1 else title
            values = np.nan_to_num([run.rows[key] for key in bands])
            values = values / np.maximum(values.sum(0), 1e-9)
            step, seconds = averaged(run.rows["step"], BARS), averaged(run.rows["seconds"], BARS)
            series = [
                Series(label, colour, 0, step, seconds, averaged(share, BARS))
                for share, (label, colour) in zip(values, bands.values(), strict=True)
            ]
            yield Figure(title, what, "share", series, stacked=True)


def _lags(run: Run) -> Iterator[tuple[str, str, Bands]]:
    """Name the bands of one stack: ages of tokens up to the largest that occurred."""
    keys = sorted(
        (key for key in run.rows if key.startswith("tokens_lag_")), key=lambda key: int(key[11:])
    )
    last = max([lag for lag, key in enumerate(keys) if np.nansum(run.rows[key]) > 0], default=0)
    bands = {
        key: (f"lag {key[11:]}", f"l{min(lag, 7)}") for lag, key in enumerate(keys[: last + 1])
    }
    yield "Lag", "Trained tokens by age in steps, share", bands


def _states(run: Run) -> Iterator[tuple[str, str, Bands]]:
    """Name the bands of a stack for each role: what its actors spend their time in."""
    for role in sorted(
        roles_of(run.rows), key=lambda role: ROLES.index(role) if role in ROLES else len(ROLES)
    ):
        bands = {
            f"{role}_{state}": (state, f"s-{state}")
            for state in STATES
            if f"{role}_{state}" in run.rows
        }
        yield role.capitalize().replace("_", " "), "Share of time in each state", bands


def _with_marks(figures: list[Figure], runs: list[Run]) -> list[Figure]:
    """Keep the figures with a curve, and mark checkpoints and what happened to members where one
    run alone is shown."""
    last_step, last_second = (max(run.rows[key][-1] for run in runs) for key in ("step", "seconds"))
    marks = list(marks_of(runs[0])) if len(runs) == 1 else None
    return [
        replace(figure, ends=(last_step, last_second), marks=marks)
        for figure in figures
        if figure.series
    ]


def constant(figure: Figure) -> float | None:
    """Return the one value that all curves have everywhere, which needs no picture."""
    means = (x for series in figure.series for x in series.mean)
    distinct = {float(f"{x:.4g}") for x in means if not np.isnan(x)}
    return distinct.pop() if len(distinct) == 1 and not figure.stacked else None


def marks_of(run: Run) -> Iterator[tuple[str, float, float]]:
    """Place at most 60 of a kind, evenly."""
    happened = {event["step"] for event in run.events if event["step"] is not None}
    for kind, steps in (("checkpoint", run.checkpoints), ("event", sorted(happened))):
        places = np.linspace(0, len(steps) - 1, min(len(steps), 60)).astype(int)
        shown = np.array(steps, float)[places]
        yield from (
            (kind, *mark) for mark in zip(shown.tolist(), run.times(shown).tolist(), strict=True)
        )


def averaged(values: np.ndarray, most: int) -> np.ndarray:
    """Average at most `most` runs of neighbours, NaN left out."""
    if len(values) <= most:
        return values
    starts, known = _starts(len(values), most), ~np.isnan(values)
    count = np.add.reduceat(known, starts, dtype=float)
    return np.add.reduceat(np.where(known, values, 0), starts) / np.where(count, count, np.nan)


def extremes(values: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the lowest and the highest of each run of neighbours that `averaged` makes one of."""
    starts = _starts(len(values), most)
    return np.fmin.reduceat(values, starts), np.fmax.reduceat(values, starts)


def _starts(count: int, most: int) -> np.ndarray:
    return (np.arange(most) * count) // most
