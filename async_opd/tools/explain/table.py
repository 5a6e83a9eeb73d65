"""The effect of an objective for the eye: a row a token."""

from collections.abc import Iterator
from itertools import count, zip_longest
from typing import Any

from msgspec import UNSET

from async_opd.tools.explain.rollouts import Rollouts, Trajectory

GREEN = "\033[32m"
RED = "\033[31m"
RESET = "\033[0m"
LOGPS = ("student", "behaviour", "teacher", "reference")
WIDTHS = {name: 10 for name in (*LOGPS, "advantage", "weight", "selected", "ratio")} | {
    "coefficient": 12
}
BOUNDED = {
    "signal_bounded": ("signal_at_most", "the signal"),
    "weight_bounded": ("weight_at_most", "weight · ratio"),
}
Row = tuple[Any, Any, list[Any]]  # place, token, numbers; None is shown as a dash, "" as nothing


def table(rollouts: Rollouts, effects: list[dict[str, Any]], *, colour: bool) -> Iterator[str]:
    """Write lines of at most 120 columns: for each trajectory a heading and a row a token, with
    rows below it for its candidates and their tail. With `colour`, what becomes likelier is green,
    and what becomes less likely red. What a bound lowered has an asterisk."""
    for number, t, effect in zip(count(), rollouts.trajectories, effects, strict=False):
        prompt = "" if t.prompt is UNSET else f"prompt {t.prompt}, "
        reward = (
            ""
            if t.reward is UNSET
            else f"reward {'unknown' if t.reward is None else f'{t.reward:g}'}, "
        )
        yield f"{chr(10) if number else ''}trajectory {number}: {prompt}{reward}{t.length} tokens"
        yield f"{'place':>5}  {'token':<16}" + "".join(
            f"{name:>{width}}" for name, width in WIDTHS.items()
        )
        for place in range(t.length):
            for row in _rows(t, effect, place):
                change = row[2][-1] or 0
                paint = GREEN if change > 0 else RED if change < 0 else ""
                yield f"{paint}{_line(*row)}{RESET}" if colour and paint else _line(*row)
    if any(any(effect.get(name, ())) for effect in effects for name in BOUNDED):
        yield f"\n* lowered: {', '.join(f'{what} by {name}' for name, what in BOUNDED.values())}"


def _rows(t: Trajectory, effect: dict[str, Any], place: int) -> Iterator[Row]:
    """Yield one for the generated token, one for each candidate that has a coefficient, and one for
    the tail that has."""
    here = {name: values and values[place] for name, values in effect.items()}
    advantages, ratios = _several(here["advantage"]), _several(here["ratio"])
    coefficients = _several(here["coefficient"]) + here.get("candidate_coefficient", [])
    if here["advantage"] is None and "candidate_coefficient" not in here:  # of candidates alone
        coefficients = [None, *coefficients]
    fields = {name: values[place] for name, values in t.per_token.items()}
    numbers = [
        *(fields.get(f"{name}_logp") for name in LOGPS),
        _marked(advantages[0], here.get("signal_bounded")),
        _marked(here["weight"], here.get("weight_bounded")),
        here["selected"],
        ratios[0],
        coefficients[0],
    ]
    yield place, fields.get("tokens", ""), numbers
    candidates = fields["candidates"] if len(coefficients) > 1 else []
    for c, advantage, ratio, coefficient in zip_longest(
        candidates, advantages[1:], ratios[1:], coefficients[1:]
    ):
        behaviour = None if c.behaviour_logp is UNSET else c.behaviour_logp
        logps = [c.student_logp, behaviour, c.teacher_logp, None]
        yield "", f"· {_shown(c.token, 14)}", [*logps, advantage, "", "", ratio, coefficient]
    if "tail_coefficient" in here:
        logps = [fields["student_tail_logp"], None, fields["teacher_tail_logp"], None]
        yield "", "· all others", [*logps, None, "", "", None, here["tail_coefficient"]]


def _several(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _line(place: Any, token: Any, numbers: list[Any]) -> str:
    cells = [f"{_number(x):>{width}}" for x, width in zip(numbers, WIDTHS.values(), strict=True)]
    return f"{place:>5}  {_shown(token, 16):<16}{''.join(cells)}"


def _marked(x: Any, lowered: bool | None) -> Any:
    return f"{_number(x)}*" if lowered else x


def _number(x: Any) -> str:
    if x is None:
        return "-"
    if isinstance(x, float):
        return f"{x:.4f}" if abs(x) < 1000 else f"{x:.2e}"
    return str(x)


def _shown(token: str | int, width: int) -> str:
    """Show it on one line, with its spaces."""
    text = repr(token)[1:-1] if isinstance(token, str) else str(token)
    return text if len(text) <= width else text[: width - 1] + "…"
