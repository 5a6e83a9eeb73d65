"""The page: facts, figures and rollouts of the runs, in one file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from async_opd.core.errors import ConfigError
from async_opd.tools.report import figures, plot, rollouts
from async_opd.tools.report.plot import duration, number
from async_opd.tools.report.read import Run, read

MOST_RUNS = 8  # colours that can be told apart
ROLLOUTS = 12  # on a page
EVENTS = 50


@dataclass
class Panel:
    """One figure on the page."""

    id: str
    figure: figures.Figure
    plots: list[plot.Plot]
    heading: list[str]
    rows: list[list[str]]
    data: dict[str, Any]  # for the script


def page(folders: list[Path]) -> str:
    """The HTML of a report of those run directories. Raises RunMissing, and ConfigError for too
    many."""
    if len(folders) > MOST_RUNS:
        raise ConfigError(
            f"report: {len(folders)} runs: at most {MOST_RUNS} can be told apart on one page"
        )
    names = _names(folders)
    share = max(ROLLOUTS // len(folders), 2)
    runs = [read(folder, name, share) for folder, name in zip(folders, names, strict=True)]
    found = {
        "Learning": figures.learning(runs),
        "Staleness and weights": figures.off_policy(runs),
        "Where the time went": figures.flow(runs),
    }
    sections = [
        (title, _panels(f"f{at}", those), _constants(those))
        for at, (title, those) in enumerate(found.items())
    ]
    shown = [rollout for run in runs for rollout in rollouts.rollouts(run)]  # may add remarks
    return _template().render(
        runs=runs,
        sections=sections,
        facts=_facts(runs),
        environment=_environment(runs),
        figures_of_merit=[_merit(run) for run in runs],
        differ=_differences(runs),
        drops=_drops(runs),
        events=[(run, run.events[-EVENTS:]) for run in runs if run.events],
        most_events=EVENTS,
        rollouts=shown,
        agreement=any("agree" in rollout.numbers for rollout in shown),
        chosen=not all("agree" in rollout.numbers for rollout in shown),
        tokens=rollouts.TOKENS,
        averaged=any(
            panel.figure.series[0].low is not None for _, panels, _ in sections for panel in panels
        ),
        remarks=[f"{run.name}: {remark}" for run in runs for remark in run.remarks]
        + list(figures.absent(runs)),
        data={panel.id: panel.data for _, panels, _ in sections for panel in panels},
    )


def _template() -> Template:
    found = Environment(
        loader=PackageLoader("async_opd.tools.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.policies["json.dumps_kwargs"] = {"allow_nan": False}  # in the order given
    return found.get_template("page.html")


def _names(folders: list[Path]) -> list[str]:
    """The folder's own names, or whole paths where two are alike."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def _panels(section: str, found: list[figures.Figure]) -> list[Panel]:
    panels = []
    for at, figure in enumerate(figure for figure in found if figures.constant(figure) is None):
        plots = [drawn for axis in ("step", "time") if (drawn := plot.plot(figure, axis))]
        heading, rows = plot.table(figure)
        panels.append(Panel(f"{section}-{at}", figure, plots, heading, rows, plot.read_out(figure)))
    return panels


def _constants(found: list[figures.Figure]) -> str:
    """The figures that are a straight line, in words."""
    values = ((figure, figures.constant(figure)) for figure in found)
    return ", ".join(
        f"{each.title.lower()} {number(value, each.unit)}"
        for each, value in values
        if value is not None
    )


def _share(value: Any) -> str:
    return number(value, "share") if isinstance(value, float) else "–"


def _merit(run: Run) -> list[tuple[str, str, str]]:
    """The few numbers one looks for first: value, what it is, and a note."""
    summary, kl = run.summary, run.rows.get("kl")
    found = []
    if isinstance(after := summary.get("accuracy_after"), float):
        before = _share(summary.get("accuracy_before"))
        found.append(
            (
                f"{before} → {_share(after)}",
                "held-out accuracy",
                f"{summary.get('eval_problems')} problems",
            )
        )
    if kl is not None:
        found.append(
            (
                f"{number(kl[0])} → {number(kl[-1])}",
                "KL to the teacher",
                "nats a token, first and last step",
            )
        )
    speed = summary.get("trained_tokens_per_s")
    if isinstance(speed, float):
        # Of all starts: the summary's are those of the last.
        trained = sum(
            float(np.nansum(run.rows[key]))
            for key in ("tokens", "tokens_taught")
            if key in run.rows
        )
        found.append((number(speed), "trained tokens/s", f"{number(trained)} in all"))
    asked = run.config.get("run.steps", "?")
    steps = number(run.rows["step"][-1])
    found.append((duration(run.rows["seconds"][-1]), "of training", f"{steps} of {asked} steps"))
    return found


def _facts(runs: list[Run]) -> list[tuple[str, list[str]]]:
    """A row a fact, a column a run."""

    def setting(key: str) -> list[str]:
        return [run.config.get(key, "–") for run in runs]

    def said(key: str, show=number) -> list[str]:
        values = [run.summary.get(key) for run in runs]
        return [show(float(x)) if isinstance(x, int | float) else "–" for x in values]

    teachers = sorted(
        {key for run in runs for key in run.summary if key.startswith("teacher_accuracy")}
    )
    found = [
        ("objective", setting("objective.tag")),
        ("student", setting("student.model")),
        ("teacher", setting("teacher.model")),
        ("steps done", [number(run.rows["step"][-1]) for run in runs]),
        ("accuracy before", said("accuracy_before", _share)),
        ("accuracy after", said("accuracy_after", _share)),
        *((key.replace("_", " "), said(key, _share)) for key in teachers),
        (
            "final KL, nats",
            [number(run.rows["kl"][-1]) if "kl" in run.rows else "–" for run in runs],
        ),
        ("trained tokens/s", said("trained_tokens_per_s")),
        ("largest lag, steps", said("max_lag_seen")),
        ("scored and dropped", said("scored_dropped")),
        ("restarts", said("restarts")),
        ("training time", [duration(run.rows["seconds"][-1]) for run in runs]),
    ]
    return [(name, values) for name, values in found if set(values) != {"–"}]


def _environment(runs: list[Run]) -> list[tuple[str, list[str]]]:
    versions = [run.environment.get("versions", {}) for run in runs]
    names = dict.fromkeys(name for own in versions for name in own)
    commits = [(run.environment.get("commit") or "–")[:12] for run in runs]
    return [
        ("commit", commits),
        *((name, [own.get(name, "–") for own in versions]) for name in names),
    ]


def _differences(runs: list[Run]) -> list[tuple[str, list[str]]]:
    """Settings that are not the same in all runs; of paths in a run's directory, what follows
    that."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    values = ((key, [_within(run, run.config.get(key, "–")) for run in runs]) for key in keys)
    return [(key, given) for key, given in values if len(set(given)) > 1]


def _within(run: Run, value: str) -> str:
    folder = run.config.get("run.dir", "")
    return "RUN" + value.removeprefix(folder) if folder and value.startswith(folder) else value


def _drops(runs: list[Run]) -> list[tuple[str, list[str]]]:
    keys = sorted({key for run in runs for key in run.summary if key.startswith("dropped_")})
    return [
        (key[8:].replace("_", " "), [number(run.summary.get(key, 0)) for run in runs])
        for key in keys
    ]
