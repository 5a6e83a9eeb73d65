"""The page: facts, figures and rollouts of the runs, in one file."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from async_opd.core.errors import ConfigError
from async_opd.core.wire import trained_tokens
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
    """Write the HTML of a report of those run directories. Raises RunMissing, and ConfigError for
    too many."""
    if len(folders) > MOST_RUNS:
        raise ConfigError(
            f"report: {len(folders)} runs: at most {MOST_RUNS} can be told apart on one page"
        )
    share = max(ROLLOUTS // len(folders), 2)
    runs = [
        read(folder, name, share) for folder, name in zip(folders, _names(folders), strict=True)
    ]
    figures_of = {
        "Learning": figures.learning(runs),
        "Staleness and weights": figures.off_policy(runs),
        "Where the time went": figures.flow(runs),
    }
    sections = [
        (title, _panels(f"f{place}", drawn), _constants(drawn))
        for place, (title, drawn) in enumerate(figures_of.items())
    ]
    shown = [rollout for run in runs for rollout in rollouts.rollouts(run)]  # may add remarks
    return _template().render(
        runs=runs,
        sections=sections,
        facts=_facts(runs),
        environment=_environment(runs),
        merits=_merits(runs[0]),
        differ=_differences(runs),
        drops=_drops(runs),
        events=[(run, run.events[-EVENTS:]) for run in runs if run.events],
        most_events=EVENTS,
        rollouts=shown,
        agreement=any("agree" in rollout.numbers for rollout in shown),
        chosen=not all("agree" in rollout.numbers for rollout in shown),
        averaged=any(
            panel.figure.series[0].spread for _, panels, _ in sections for panel in panels
        ),
        remarks=[f"{run.name}: {remark}" for run in runs for remark in run.remarks]
        + list(figures.absent(runs)),
        data={panel.id: panel.data for _, panels, _ in sections for panel in panels},
    )


def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("async_opd.tools.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # The keys of a dictionary keep their order.
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False}
    return environment.get_template("page.html")


def _names(folders: list[Path]) -> list[str]:
    """Name each run by its folder, or by the whole path where two are alike."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def _panels(section: str, drawn: list[figures.Figure]) -> list[Panel]:
    return [
        Panel(
            f"{section}-{place}",
            figure,
            [each for axis in ("step", "time") if (each := plot.plot(figure, axis))],
            *plot.table(figure),
            plot.read_out(figure),
        )
        for place, figure in enumerate(
            figure for figure in drawn if figures.constant(figure) is None
        )
    ]


def _constants(drawn: list[figures.Figure]) -> str:
    """Say in words the figures that are a straight line."""
    return ", ".join(
        f"{figure.title.lower()} {number(value, figure.unit)}"
        for figure in drawn
        if (value := figures.constant(figure)) is not None
    )


def _share(value: Any) -> str:
    return number(value, "share") if isinstance(value, float) else "–"


def _merits(run: Run) -> Iterator[tuple[str, str, str]]:
    """Choose the few numbers one looks for first: value, what it is, and a note."""
    summary = run.summary
    if isinstance(after := summary.get("accuracy_after"), float):
        value = f"{_share(summary.get('accuracy_before'))} → {_share(after)}"
        known = f"{_share(summary.get('eval_known'))} of the verdicts known"
        yield value, "held-out accuracy", f"{summary.get('eval_problems')} problems, {known}"
    if (kl := run.rows.get("kl")) is not None:
        value = f"{number(kl[0])} → {number(kl[-1])}"
        yield value, "KL to the teacher", "nats a token, first and last step"
    if isinstance(speed := summary.get("trained_tokens_per_s"), float):
        # Of all starts: the summary's are those of the last.
        trained = trained_tokens({key: float(np.nansum(run.rows[key])) for key in run.rows})
        yield number(speed), "trained tokens/s", f"{number(trained)} in all"
    steps = f"{number(run.rows['step'][-1])} of {run.config.get('run.steps', '?')} steps"
    yield duration(run.rows["seconds"][-1]), "of training", steps


def _facts(runs: list[Run]) -> list[tuple[str, list[str]]]:
    """List a row a fact, a column a run."""

    def setting(key: str) -> list[str]:
        return [run.config.get(key, "–") for run in runs]

    def result(key: str, show: Callable[[float], str] = number) -> list[str]:
        values = (run.summary.get(key) for run in runs)
        return [show(float(x)) if isinstance(x, int | float) else "–" for x in values]

    facts = [
        ("objective", setting("objective.tag")),
        ("student", setting("student.model")),
        ("teacher", setting("teacher.model")),
        ("steps done", [number(run.rows["step"][-1]) for run in runs]),
        ("accuracy before", result("accuracy_before", _share)),
        ("accuracy after", result("accuracy_after", _share)),
        ("verdicts known", result("eval_known", _share)),
        *((key.replace("_", " "), result(key, _share)) for key in _keys(runs, "teacher_accuracy")),
        (
            "final KL, nats",
            [number(run.rows["kl"][-1]) if "kl" in run.rows else "–" for run in runs],
        ),
        ("trained tokens/s", result("trained_tokens_per_s")),
        ("largest lag, steps", result("max_lag_seen")),
        ("scored and dropped", result("scored_dropped")),
        ("restarts", result("restarts")),
        ("training time", [duration(run.rows["seconds"][-1]) for run in runs]),
    ]
    return [(name, values) for name, values in facts if set(values) != {"–"}]


def _environment(runs: list[Run]) -> list[tuple[str, list[str]]]:
    versions = [run.environment.get("versions", {}) for run in runs]
    names = dict.fromkeys(name for of_run in versions for name in of_run)
    return [
        ("commit", [(run.environment.get("commit") or "–")[:12] for run in runs]),
        *((name, [of_run.get(name, "–") for of_run in versions]) for name in names),
    ]


def _differences(runs: list[Run]) -> list[tuple[str, list[str]]]:
    """List the settings that are not the same in all runs; of paths in a run's directory, what
    follows that."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    values = ((key, [_within(run, run.config.get(key, "–")) for run in runs]) for key in keys)
    return [(key, of_runs) for key, of_runs in values if len(set(of_runs)) > 1]


def _within(run: Run, value: str) -> str:
    folder = run.config.get("run.dir", "")
    return "RUN" + value.removeprefix(folder) if folder and value.startswith(folder) else value


def _drops(runs: list[Run]) -> list[tuple[str, list[str]]]:
    return [
        (key[8:].replace("_", " "), [number(run.summary.get(key, 0)) for run in runs])
        for key in _keys(runs, "dropped_")
    ]


def _keys(runs: list[Run], prefix: str) -> list[str]:
    """List the keys of all summaries that begin so."""
    return sorted({key for run in runs for key in run.summary if key.startswith(prefix)})
