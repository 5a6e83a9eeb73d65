"""All rows of a set looked at before anything is trained: types and keys of all, then what they
render and tokenize to, and their references meanwhile."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from async_opd.core.errors import AsyncOpdError, DataError
from async_opd.core.foreign import foreign
from async_opd.core.printing import say
from async_opd.roles.rollout.content import columns_of, content_of
from async_opd.roles.rollout.dataset import named_columns
from async_opd.roles.rollout.flaws import Flaw, keep, kept, key_of, refusal
from async_opd.roles.rollout.judge import Judge
from async_opd.roles.rollout.render import Rendered

CHUNK = 512  # rows that are tokenized together
SAY_S = 5.0  # between two lines of progress


class Survey:
    """A look at all rows, in a thread of its own: it may go on beside what follows."""

    def __init__(self, rows: datasets.Dataset, judge: Judge, key: str, *, base: int = 0):
        """Take `rows` of the set that stands in the setting `key`, of which they are those from
        `base` on, to be judged by `judge`."""
        self._base = base
        self._judge, self._config = judge, judge.config
        self._rows = rows.select_columns(columns_of(judge.config))
        self._key = key
        self.flaws: dict[int, Flaw] = {}  # by the place of the row in its set
        self.file: Path | None = None  # that holds all flaws
        self.ended = False  # every row was looked at
        self._looked = 0
        self._heeded = False  # there is nothing to be raised any more
        self._error: AsyncOpdError | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="survey of rows", daemon=True)

    @cached_property
    def content(self) -> str:
        """The hash of the rows, of all columns that the config names."""
        return content_of(self._rows, self._config)

    def look(self, seconds: float, poll: Callable[[], None]) -> None:
        """Look at all rows, for at most so many seconds: the rest goes on by itself. Prints how far
        it is, and calls `poll` several times a second: what that raises ends it."""
        begun = said_last = time.monotonic()
        self._thread.start()
        with ExitStack() as undo:
            undo.callback(self.stop)  # unless it comes to its end
            while self._thread.is_alive() and (now := time.monotonic()) < begun + seconds:
                self._thread.join(0.2)
                poll()
                if now - said_last > SAY_S:
                    said_last = now
                    say(f"{self._so_far} looked at")
            undo.pop_all()
        self.refuse()
        if self._thread.is_alive():
            say(f"{self._so_far} looked at after {seconds:g} s; the others beside what follows")

    def refuse(self) -> None:
        """Raise DataError naming the rows met so far that are to end the run."""
        if self._heeded:
            return
        ended = self.ended
        if self._error:
            raise self._error
        flaws = sorted(list(self.flaws.values()), key=lambda flaw: flaw.place)
        if refused := [flaw for flaw in flaws if self._judge.refuses(flaw)]:
            self.stop()
            rows = len(self._rows) if ended else self._looked
            raise refusal(self._key, self._config.path, refused, of=max(rows, len(refused)))
        self._heeded = ended

    def stop(self) -> None:
        """Look no further."""
        self._stop.set()

    @property
    def _so_far(self) -> str:
        return f"{self._key} = {self._config.path!r}: {self._looked:,} of {len(self._rows):,} rows"

    def _run(self) -> None:
        try:
            with foreign(f"{self._key} = {self._config.path!r}"):
                self._judge_all()
        except AsyncOpdError as e:  # raised where it is waited for
            self._error = e

    def _judge_all(self) -> None:
        judged_by = f"{self._base} {self._judge.key}"
        key = key_of(self.content, self._judge.tokenizer, judged_by)
        if before := kept(key):
            self.file, self.flaws = before
        else:
            self._scan()
            self.file = None if self._stop.is_set() else keep(key, self.flaws)
        self.ended = not self._stop.is_set()

    def _scan(self) -> None:
        self._types()
        with ThreadPoolExecutor(1) as beside, ExitStack() as undo:
            undo.callback(self.stop)  # unless it comes to its end
            references = beside.submit(self._references)
            self._renderings()
            for place, what in references.result():
                self._flaw(place, what)
            undo.pop_all()

    def _flaw(self, place: int, what: str, *, long: bool = False) -> None:
        if not self._is_flawed(place):
            row = {**self._rows[place], "_position": self._base + place}
            self.flaws[self._base + place] = self._judge.flaw(row, what, long=long)

    def _is_flawed(self, place: int) -> bool:
        return self._base + place in self.flaws

    def _types(self) -> None:
        """Find rows with wrong types or keys: in Python only where the table does not tell."""
        table, features = self._rows.with_format("arrow")[:], self._rows.features
        names = named_columns(self._config)
        if id := names.pop("id", None):
            self._ids(id)
        doubted = [
            _doubtful(table[name]) if isinstance(features[name], datasets.Value) else None
            for name in names.values()
        ]
        # a solution is needed of the rows for some teachers only, and a name may be unknown
        places = (
            None
            if any(each is None for each in doubted) or "teacher" in names
            else np.unique(np.concatenate([each for each in doubted if each is not None]))
        )
        for place, row in self._each(places):
            try:
                self._judge.renderer.check_types(row)
            except DataError as e:
                self._flaw(place, str(e))

    def _ids(self, column: str) -> None:
        """Find ids that are none, or that an earlier row has."""
        first: dict[str, int] = {}
        for start in range(0, len(self._rows), CHUNK):
            for place, id in enumerate(self._rows[start : start + CHUNK][column], start=start):
                if what := self._judge.wrong_id({column: id}):
                    self._flaw(place, what)
                elif (earlier := first.setdefault(str(id), place)) != place:
                    self._flaw(
                        place,
                        f"its id {column!r} is also that of row {self._base + earlier} (from 0)",
                    )

    def _each(self, places: np.ndarray | None) -> Iterator[tuple[int, dict[str, Any]]]:
        """Give rows with their places: those at `places`, or all."""
        chosen = np.arange(len(self._rows)) if places is None else places
        for start in range(0, len(chosen), CHUNK):
            if self._stop.is_set():
                return
            some = chosen[start : start + CHUNK].tolist()
            contiguous = some[-1] - some[0] + 1 == len(some)
            columns = self._rows[some[0] : some[-1] + 1] if contiguous else self._rows[some]
            for i, place in enumerate(some):
                yield place, {name: column[i] for name, column in columns.items()}

    def _renderings(self) -> None:
        """Find rows that do not render or tokenize, or are too long. The next chunk is rendered
        while one is tokenized."""
        with ThreadPoolExecutor(1) as beside:
            pending: tuple[list[tuple[int, Rendered]], Future] | None = None
            chunk: list[tuple[int, Rendered]] = []
            for place, row in self._each(None):
                if not self._is_flawed(place):
                    try:
                        chunk.append((place, self._judge.renderer.rendered(row)))
                    except DataError as e:
                        self._flaw(place, str(e))
                if len(chunk) == CHUNK or place == len(self._rows) - 1:
                    rows = [rendered for _, rendered in chunk]
                    coming = beside.submit(self._judge.encoded, rows) if rows else None
                    if pending:
                        self._lengths(*pending)
                    pending = (chunk, coming) if coming else None
                    chunk, self._looked = [], place + 1
            if pending:
                self._lengths(*pending)

    def _lengths(self, chunk: list[tuple[int, Rendered]], coming: Future) -> None:
        for (place, rendered), ids in zip(chunk, coming.result(), strict=True):
            over = self._judge.wrong(rendered, ids)
            if over:
                self._flaw(place, over[0], long=over[1])

    def _references(self) -> list[tuple[int, str]]:
        """Find rows whose reference the check cannot use."""
        answers = [str(answer) for answer in self._rows[self._config.answer][:]]
        asked = [answer for place, answer in enumerate(answers) if not self._is_flawed(place)]
        wrong = self._judge.unusable(asked, self._stop)
        return [(place, wrong[each]) for place, each in enumerate(answers) if each in wrong]


def _doubtful(column: pa.ChunkedArray) -> np.ndarray | None:
    """Find the places of values that are null, blank or no number; None: each must be looked at."""
    kind = column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        trimmed = pc.call_function("utf8_trim_whitespace", [column])
        fine = pc.call_function("greater", [pc.call_function("utf8_length", [trimmed]), 0])
    elif pa.types.is_integer(kind):
        fine = pc.call_function("is_valid", [column])
    elif pa.types.is_floating(kind):
        fine = pc.call_function("is_finite", [column])
    else:
        return None
    return np.flatnonzero(~np.asarray(fine.fill_null(False)))
