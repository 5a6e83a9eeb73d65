"""Prompts from any dataset that `datasets` loads: columns, chat template, tokens, order by seed."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.exceptions import DatasetsError
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from async_opd.core.errors import DataError
from async_opd.core.process_wide import log_level
from async_opd.core.suggest import wrong
from async_opd.core.wire import Prompt
from async_opd.roles.rollout.config import FILE_READERS, DataConfig
from async_opd.roles.rollout.teacher_prompt import TeacherView


class PromptSource:
    """An iterator of `Prompt`s over epochs. Each epoch has an order of its own, fixed by `seed` and
    the epoch. It goes on from `position`, which is where it stopped.

    Raises DataError naming the row for a missing or mistyped column, for an unknown teacher, for a
    prompt over its bound in either rendering (where `long_prompt` is "skip" it counts as `skipped`
    instead), and when the epochs are used up.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: PreTrainedTokenizerBase,
        *,
        seed: int,
        views: Mapping[str, TeacherView] | None = None,
        head: int | None = None,
    ):
        """Load the rows and check their columns. `views` say by name what each teacher is shown
        (one alone has the name ""); absent: what the student is. Prompts carry the teacher's
        rendering too where it is another. `head`: rows of the student's, absent: enough."""
        self._config, self._head = config, head
        self._tokenizer = tokenizer
        self._seed = seed
        self._views = {"": TeacherView()} if views is None else views
        if config.chat_template and not tokenizer.chat_template:
            raise DataError(
                "data.chat_template = true: the tokenizer of student.model has no chat template"
            )
        self._rows = _load(config)
        self.skipped = 0  # prompts that were too long
        self._epoch, self._drawn = 0, 0  # how far it was read
        columns = self._rows.column_names
        for key in ("prompt", "answer", "id", "teacher", "solution"):
            name = getattr(config, key)
            if name is not None and columns is not None and name not in columns:
                raise DataError(
                    f"data.{key} = {name!r}: {config.path} has columns {', '.join(columns)}"
                )
        if config.id and not config.streaming and len(self._table.unique(config.id)) < len(self):
            raise DataError(f"data.id = {config.id!r}: rows of {config.path} share ids")
        if config.teacher and not config.streaming and not self._all_are_known(config.teacher):
            for row in self._numbered(self._rows):
                self._teacher(self._id(row), row)

    def __len__(self) -> int:
        """Count the rows of one epoch; a streaming set has no length and raises TypeError."""
        return len(self._table)

    def __iter__(self) -> Iterator[Prompt]:
        while self._config.epochs is None or self._epoch < self._config.epochs:
            # Of an epoch that is continued the rows so far have been seen.
            served = bool(self._drawn)
            for row in self._shuffled(self._epoch, self._drawn):
                self._drawn += 1
                prompt = self.prompt(row, self._epoch)
                if prompt is not None:
                    served = True
                    yield prompt
            if not served:
                raise DataError(f"data.path = {self._config.path!r}: no usable row")
            self._epoch, self._drawn = self._epoch + 1, 0
        raise DataError(
            f"data.path = {self._config.path!r}: {self._epoch} epochs are used up;"
            " raise data.epochs"
        )

    @property
    def position(self) -> dict[str, Any]:
        """How far the source was read, in plain JSON: where `continued` goes on."""
        return {
            "epoch": self._epoch,
            "drawn": self._drawn,
            "skipped": self.skipped,
            "rows": None if self._config.streaming else len(self),
        }

    def continued(self, position: dict[str, Any], outstanding: Sequence[str]) -> Iterator[Prompt]:
        """Give the prompts `outstanding`, which were handed out before, then those that follow
        `position`: the ones that an unbroken iteration would give. Raises DataError for a set that
        has changed since."""
        if not self._config.streaming and position["rows"] != len(self):
            raise DataError(
                f"data.path = {self._config.path!r}: {len(self)} rows,"
                f" it had {position['rows']} before"
            )
        self._epoch, self._drawn = position["epoch"], position["drawn"]
        again = self._again(outstanding)
        self.skipped = position["skipped"]
        return chain(again, self)

    def _again(self, ids: Sequence[str]) -> list[Prompt]:
        """Make the prompts of these ids again, in their order."""
        wanted = [(name, int(epoch)) for name, _, epoch in (id.rpartition("@") for id in ids)]
        prompts = {
            f"{self._id(row)}@{epoch}": self.prompt(row, epoch)
            for epoch in dict.fromkeys(epoch for _, epoch in wanted)
            for row in self._of({name for name, its_epoch in wanted if its_epoch == epoch}, epoch)
        }
        for id in ids:
            if prompts.get(id) is None:
                changed = "is too long" if id in prompts else "is not there"
                raise DataError(
                    f"row {id}: handed out before, but {changed} now: "
                    f"{self._config.path} has changed"
                )
        return [prompt for id in ids if (prompt := prompts[id]) is not None]

    def _of(self, names: set[str], epoch: int) -> Iterator[dict]:
        """Find the rows of these names. A stream is read from the start of the epoch until all are
        there."""
        if self._config.streaming:
            named = (row for row in self._shuffled(epoch) if self._id(row) in names)
        elif self._config.id:
            column = enumerate(self._table[self._config.id])
            named = (self._row(place) for place, name in column if str(name) in names)
        else:
            places = (int(name) for name in names if name.isdecimal())
            named = (self._row(place) for place in places if place < len(self))
        return islice(named, len(names))

    def first(self, count: int | None) -> list[Prompt]:
        """Make the first `count` prompts in file order, or all, for evaluation."""
        prompts = (self.prompt(row, 0) for row in self._numbered(self._rows))
        usable = list(islice((p for p in prompts if p is not None), count))
        if len(usable) < (count or 1):
            raise DataError(
                f"eval.path = {self._config.path!r}: {len(usable)} usable rows,"
                f" eval.problems = {count or 1}"
            )
        return usable

    def prompt(self, row: dict, epoch: int) -> Prompt | None:
        """Render and tokenize one row; None where it is too long and to be left out."""
        id = f"{self._id(row)}@{epoch}"
        content, answer = row.get(self._config.prompt), row.get(self._config.answer)
        if not isinstance(content, str | list) or not content:
            raise DataError(
                f"row {id}: {self._config.prompt!r} must be a string or a list of messages,"
                f" got {content!r}"
            )
        if not isinstance(answer, str | int | float):
            raise DataError(
                f"row {id}: {self._config.answer!r} must be a string or a number, got {answer!r}"
            )
        teacher = self._teacher(id, row)
        view = self._views[teacher]
        ids, teacher_ids = self._tokens(id, content, self._config.template_args), None
        bound = "data.max_prompt_tokens", self._config.max_prompt_tokens
        lengths: list[tuple[int, tuple[str, int]]] = [(len(ids), bound)]
        if view.differs:
            shown = view.shown(id, content, row.get(self._config.solution), self._config.solution)
            teacher_ids = self._tokens(id, shown, self._config.template_args | view.template_args)
            lengths.append((len(teacher_ids), view.longest or bound))
        over = [
            f"{length} prompt tokens, {key} = {limit}"
            for length, (key, limit) in lengths
            if length > limit
        ]
        if over and self._config.long_prompt == "error":
            raise DataError(
                f"row {id}: {over[0]}; shorten it, raise the limit,"
                ' or set data.long_prompt = "skip"'
            )
        if over:
            self.skipped += 1
            return None
        return Prompt(id=id, ids=ids, answer=str(answer), teacher_ids=teacher_ids, teacher=teacher)

    def _id(self, row: dict) -> str:
        return str(row[self._config.id] if self._config.id else row["_position"])

    def _all_are_known(self, column: str) -> bool:
        """Tell whether every value is a teacher's name, without looking at row by row."""
        text = getattr(self._table.features[column], "dtype", "") in ("string", "large_string")
        return text and self._views.keys() >= set(self._table.unique(column))

    def _teacher(self, id: str, row: dict) -> str:
        """Read the name of the teacher that the row is for."""
        if self._config.teacher is None:
            return ""
        name = row.get(self._config.teacher)
        if not isinstance(name, str) or name not in self._views:
            column = f"data.teacher, column {self._config.teacher!r}"
            raise DataError(f"row {id}: {wrong(column, name, self._views)}")
        return name

    def _tokens(self, id: str, content: str | list, template_args: dict) -> np.ndarray:
        if self._config.chat_template:
            messages = (
                [{"role": "user", "content": content}] if isinstance(content, str) else content
            )
            if not all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages):
                raise DataError(
                    f"row {id}: {self._config.prompt!r} holds a message without role or"
                    f" content: {messages!r}"
                )
            try:
                content = str(  # which it is, as it does not tokenize
                    self._tokenizer.apply_chat_template(
                        messages, tokenize=False, add_generation_prompt=True, **template_args
                    )
                )
            except TemplateError as e:
                raise DataError(
                    f"row {id}: the chat template refuses {self._config.prompt!r}: {e}"
                ) from e
        elif isinstance(content, list):
            raise DataError(
                f"data.prompt = {self._config.prompt!r} holds messages:"
                " set data.chat_template = true"
            )
        # A template writes its own special tokens.
        ids = self._tokenizer(content, add_special_tokens=not self._config.chat_template).input_ids
        if self._head and max(ids, default=0) >= self._head:
            token = f"{self._tokenizer.convert_ids_to_tokens(max(ids))!r} ({max(ids)})"
            raise DataError(f"row {id}: holds {token}; the student's head has {self._head} rows")
        return np.asarray(ids, np.int32)

    @property
    def _table(self) -> datasets.Dataset:
        """The rows, which can be counted and picked. Raises TypeError for those of a stream."""
        if isinstance(self._rows, datasets.IterableDataset):
            raise TypeError(f"data.path = {self._config.path!r}: a streaming set has no length")
        return self._rows

    def _shuffled(self, epoch: int, start: int = 0) -> Iterator[dict]:
        """Give the rows of an epoch in its order, from the `start`-th on. Those of a stream are
        read to be passed over."""
        seed = self._seed + epoch
        if isinstance(self._rows, datasets.IterableDataset):
            rows = self._rows.shuffle(seed=seed, buffer_size=self._config.shuffle_buffer)
            return islice(self._numbered(rows), start, None)
        order = np.random.default_rng(seed).permutation(len(self))
        return (self._row(int(i)) for i in order[start:])

    def _row(self, position: int) -> dict:
        return {**self._table[position], "_position": position}

    def _numbered(self, rows: Iterable[Any]) -> Iterator[dict]:
        """Give rows in file order with their positions; those of a stream are read here."""
        numbered = enumerate(rows)
        while True:
            with _reading(self._config):
                item = next(numbered, None)
            if item is None:
                return
            yield {**item[1], "_position": item[0]}


def _load(config: DataConfig) -> datasets.Dataset | datasets.IterableDataset:
    reader = FILE_READERS.get(Path(config.path).suffix)
    with _reading(config):
        return datasets.load_dataset(  # pyright: ignore[reportCallIssue] its overloads lack `bool`
            reader or config.path,
            name=config.subset,
            data_files=config.path if reader else None,
            split=config.split,
            streaming=config.streaming,  # pyright: ignore[reportArgumentType] as above
        )


@contextmanager
def _reading(config: DataConfig) -> Iterator[None]:
    """Name the set in what `datasets` raises, which is StopIteration for an empty file, and keep
    it from bars and logs meanwhile: what it logs of a broken file, it raises too."""
    with ExitStack() as undo:
        if not datasets.are_progress_bars_disabled():
            undo.callback(datasets.enable_progress_bars)
            datasets.disable_progress_bars()
        undo.enter_context(log_level(logging.CRITICAL, logging.getLogger("datasets")))
        try:
            yield
        except (OSError, ValueError, StopIteration, DatasetsError) as e:
            # "An error occurred" has a cause that says which.
            cause = str(e.__cause__ or e) or "no rows"
            raise DataError(f"data.path = {config.path!r}, split {config.split!r}: {cause}") from e
