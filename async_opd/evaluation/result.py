"""Results of evaluations: each problem's share in one, the figures with their intervals, and how
two of them compare.

A folder holds `problems.jsonl`, a line a problem in the order in which they ended, and
`result.json`. "avg" is the mean reward, which is the share of right responses where the check gives
nothing in between; for "pass" and "maj" only a reward of 1 is right. A response whose verdict is
unknown is not right, and votes for nothing; the share of known verdicts is a figure of its own.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Struct

from async_opd.core.errors import ConfigError, RunMissing
from async_opd.core.foreign import foreign
from async_opd.core.reading import content_of, opened
from async_opd.core.run_dir import PROBLEMS
from async_opd.core.wire import Ballot, GroupMeta, Prompt, Verdict
from async_opd.evaluation.estimates import RESAMPLES, intervals, majority_at_k, means_of, pass_at_k

FIGURES = ("avg", "pass", "maj")
BOOTSTRAP_SEED = 0
INTERVAL = f"95%, percentile bootstrap over problems, {RESAMPLES} resamples, seed {BOOTSTRAP_SEED}"


class Response(Struct):
    """One response to a problem."""

    text: str
    reward: float | None  # None: the check timed out or crashed
    cause: str  # of an unknown verdict
    answer: str | None  # the part that was read
    vote: int | None  # the first response with the same answer
    tokens: int
    truncated: bool


class Shares(Struct, rename={"pass_": "pass"}):
    """Shares of one problem in each figure, where it has one."""

    id: str
    avg: float | None
    pass_: float | None
    maj: float | None


class Problem(Shares):
    """A line of `problems.jsonl`. Only its shares are read again."""

    answer: str
    responses: list[Response]


class Figure(Struct):
    """The mean of one figure over the `problems` that count for it."""

    mean: float
    low: float
    high: float
    problems: int


class Settings(Struct):
    """Settings that must be alike for two results to be compared."""

    rows: str  # digest of their ids and reference answers
    problems: int
    k: int
    samples: int
    temperature: float
    top_p: float
    max_new_tokens: int
    chat_template: bool
    template_args: dict[str, Any]
    check: str
    stop: list[int | str] = []  # that end a response besides the model's own end tokens


class Result(Struct):
    """The content of `result.json`."""

    model: str
    path: str  # of the problems
    settings: Settings
    thinking: bool | None  # as the template is told; None: as it has it by itself
    seed: int  # of the engines
    figures: dict[str, Figure]  # without "maj" where the check reads no answers
    interval: str
    tokens: float  # mean length of a response
    truncated: float  # share of the responses
    unknown: float
    wall_s: float
    environment: dict[str, Any]


def digest(prompts: Sequence[Prompt]) -> str:
    """Hash ids and reference answers, whatever tokenizer and template."""
    rows = msgspec.json.encode([(prompt.id, prompt.answer) for prompt in prompts])
    return hashlib.sha256(rows).hexdigest()[:16]


def problem(
    prompt: Prompt, meta: GroupMeta, verdicts: Sequence[Verdict], texts: Sequence[Ballot], k: int
) -> Problem:
    """Sum up the responses to `prompt`."""
    n, right = len(verdicts), sum(verdict.correct is True for verdict in verdicts)
    read = any(verdict.answer is not None for verdict in verdicts)
    pairs = zip(verdicts, texts, strict=True)
    wrong = Counter(
        text.vote for verdict, text in pairs if verdict.correct is False and text.vote is not None
    )
    silent = n - right - wrong.total()
    return Problem(
        id=prompt.id,
        answer=prompt.answer,
        avg=sum(verdict.reward or 0.0 for verdict in verdicts) / n,
        pass_=pass_at_k(n, right, k),
        maj=majority_at_k(right, list(wrong.values()), silent, k) if read else None,
        responses=[
            Response(
                text=text.text,
                reward=verdict.reward,
                cause=verdict.cause,
                answer=verdict.answer,
                vote=text.vote,
                tokens=tokens,
                truncated=truncated,
            )
            for verdict, text, tokens, truncated in zip(
                verdicts, texts, meta.lengths, meta.truncated, strict=True
            )
        ],
    )


def table(shares: Iterable[Shares]) -> npt.NDArray[np.float64]:
    """Arrange shares by FIGURES, [P, 3]; NaN where there is none, and 0 where the check reads
    answers and decided on none of this problem's."""
    all_PM = np.array([(one.avg, one.pass_, one.maj) for one in shares], np.float64)
    return np.where(np.isnan(all_PM) & ~np.isnan(all_PM).all(0), 0.0, all_PM)


def figures(shares_PM: npt.NDArray[np.float64]) -> dict[str, Figure]:
    """Compute the mean of each figure that has problems, with its interval."""
    known = [index for index in range(len(FIGURES)) if not np.isnan(shares_PM[:, index]).all()]
    columns_PM = shares_PM[:, known]
    columns = zip(
        known,
        means_of(columns_PM).tolist(),
        *intervals(columns_PM, BOOTSTRAP_SEED).tolist(),
        (~np.isnan(columns_PM)).sum(0).tolist(),
        strict=True,
    )
    return {FIGURES[index]: Figure(*column) for index, *column in columns}


def read(folder: Path) -> tuple[Result, list[Shares]]:
    """Read the result in `folder`. Raises RunMissing."""
    try:
        content = content_of(folder / "result.json")
        with opened(folder / PROBLEMS) as file:
            lines = file.read().splitlines()
    except OSError as e:
        raise RunMissing(
            f"{folder}: holds no result of `async-opd eval`: {Path(e.filename).name}: {e.strerror}"
        ) from e
    with foreign(f"{folder}: its result is damaged", RunMissing):
        result = msgspec.json.decode(content, type=Result)
        shares = [msgspec.json.decode(line, type=Shares) for line in lines]
    if len(shares) != result.settings.problems:
        raise RunMissing(
            f"{folder}: its result is damaged: {len(shares)} problems of {result.settings.problems}"
        )
    return result, sorted(shares, key=lambda one: one.id)


def compare(first: Path, second: Path) -> list[str]:
    """Say what changed from `first` to `second`, by paired resamples of the same problems. Raises
    ConfigError where they are of other problems or settings, RunMissing where there is no
    result."""
    (one, old), (two, new) = read(first), read(second)
    ours, theirs = (msgspec.to_builtins(result.settings) for result in (one, two))
    differ = [
        f"{key} = {ours[key]!r} and {theirs[key]!r}" for key in ours if ours[key] != theirs[key]
    ]
    if differ:
        raise ConfigError(
            f"--compare {first} {second}: measured by other settings: {'; '.join(differ)}"
        )
    lines = [
        f"from {one.model} ({first}) to {two.model} ({second}), on the same {one.settings.problems}"
        " problems"
    ]
    for name, change in figures(table(new) - table(old)).items():
        then, now = one.figures[name].mean, two.figures[name].mean
        lines.append(
            f"  {f'{name}@{one.settings.k}':9}{then:7.1%} -> {now:6.1%}"
            f"  {100 * change.mean:+5.1f} points"
            f" ({100 * change.low:+.1f} to {100 * change.high:+.1f})"
        )
    return [*lines, f"  intervals: {INTERVAL}, paired"]


def lines_of(result: Result) -> Iterator[str]:
    """Put the result into words."""
    how = result.settings
    mode = {None: "", True: ", thinking", False: ", not thinking"}[result.thinking]
    yield (
        f"{result.model} on {how.problems} problems of {result.path}{mode}: {how.samples}"
        f" response(s) each, temperature {how.temperature:g}, top-p {how.top_p:g}, at most"
        f" {how.max_new_tokens} tokens"
    )
    for name, figure in result.figures.items():
        some = "" if figure.problems == how.problems else f", {figure.problems} problems"
        yield (
            f"  {f'{name}@{how.k}':9}{figure.mean:7.1%}  ({figure.low:.1%} to"
            f" {figure.high:.1%}{some})"
        )
    yield (
        f"  mean length {result.tokens:.1f} tokens, {result.truncated:.1%} truncated,"
        f" {result.unknown:.1%} unknown; intervals: {result.interval}"
    )
