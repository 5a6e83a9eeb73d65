"""Rules for the data of a run: one set or several, and what is left out of them."""

import os
import re
from collections.abc import Iterator, Mapping

from async_opd.config.teacher_rules import Rule
from async_opd.roles.rollout.config import DataConfig
from async_opd.roles.teacher.config import TeacherConfig

NAME = re.compile(r"[A-Za-z0-9_]+")  # of a source: what a metric's name may hold


def data_rules(data: DataConfig) -> Iterator[Rule]:
    """Yield what each set may be named, and whether a filter has anything to do."""
    yield (
        bool(data.path and data.sources),
        f"data.path = {data.path!r}: must not stand beside [data.sources.NAME]; write one or the"
        " other",
    )
    yield (
        not (data.path or data.sources),
        "data.path: missing; must be a text, or sections [data.sources.NAME] with path and weight",
    )
    taken: dict[tuple[str, str | None, str], str] = {}
    for (key, each), name in zip(data.sets.items(), data.sources or [""], strict=True):
        yield (
            bool(name) and not NAME.fullmatch(name),
            f"data.sources.{name!r}: a name must be of letters, digits and _",
        )
        rows = os.path.realpath(each.path), each.subset, each.split
        other = taken.setdefault(rows, key)
        yield (
            other != key,
            f"{key} = {each.path!r}: the rows of split {each.split!r} are those of {other} too; a"
            " set has one weight",
        )
    yield from _filter_rules(data)


def _filter_rules(data: DataConfig) -> list[Rule]:
    """List what a filter needs: prompts that come again, and are known again."""
    is_set = data.filter is not None
    return [
        (
            is_set and data.streaming,
            "data.filter: must be absent with data.streaming = true, whose rows have no place by"
            " which they are known in the next epoch",
        ),
        (
            is_set and data.epochs == 1,
            "data.filter: has no effect with data.epochs = 1, in which no prompt comes again",
        ),
    ]


def column_rules(teachers: Mapping[str, TeacherConfig], data: DataConfig) -> Iterator[Rule]:
    """Yield which columns for teachers, by their names, each set must and may have."""
    several = "" not in teachers
    for key, column in data.columns("teacher").items():
        yield (
            several and column is None,
            f"{key}: missing; must be the name of the column that holds a row's teacher, with"
            " [teachers.NAME]",
        )
        yield (
            not several and column is not None,
            f"{key} = {column!r}: has no effect without sections [teachers.NAME]",
        )
    shown = any(teacher.context for teacher in teachers.values())
    for key, column in data.columns("solution").items():
        yield (
            column is not None and not shown,
            f"{key} = {column!r}: has no effect without a teacher's context",
        )


def evaluated_rules(teachers: Mapping[str, TeacherConfig], data: DataConfig) -> Iterator[Rule]:
    """Yield which columns of the held-out problems must be named in [data], beside sources with
    columns of their own, to measure `teachers` on them."""
    measured = [teacher for teacher in teachers.values() if teacher.evaluate]
    yield (
        bool(measured) and "" not in teachers and data.teacher is None,
        "data.teacher: missing; must be the name of the column of eval.path that holds a row's"
        " teacher, to evaluate one",
    )
    yield (
        any(teacher.context for teacher in measured) and data.solution is None,
        "data.solution: missing; must be the name of the column of eval.path with the solutions,"
        " to evaluate a teacher with a context",
    )
