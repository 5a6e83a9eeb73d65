"""Prompts from any dataset that `datasets` loads: columns, chat template, tokens, seeded shuffle per epoch."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from async_opd.errors import DataError
from async_opd.mistakes import wrong
from async_opd.rollout.config import DataConfig
from async_opd.rollout.privileged import TeacherView
from async_opd.wire import Prompt

FILE_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


class PromptSource:
    """An iterator of `Prompt`s over epochs. Each epoch has an order of its own, fixed by `seed` and the epoch.

    Raises DataError naming the row for a missing or mistyped column, for an unknown teacher, for a prompt over its
    bound in either rendering (where `long_prompt` is "skip" its id goes to `skipped` instead), and when the epochs are
    used up.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: PreTrainedTokenizerBase,
        *,
        seed: int,
        views: Mapping[str, TeacherView] | None = None,
    ):
        """`views` say by name what each teacher is shown (one alone has the name ""); absent: what the student is.
        Prompts carry the teacher's rendering too where it is another."""
        self._config, self._tokenizer, self._seed = config, tokenizer, seed
        self._views = {"": TeacherView()} if views is None else views
        if config.chat_template and not tokenizer.chat_template:
            raise DataError("data.chat_template = true: the tokenizer of student.model has no chat template")
        self._rows = _load(config)
        self.skipped: list[str] = []  # ids of prompts that were too long
        columns = self._rows.column_names
        for key in ("prompt", "answer", "id", "teacher", "solution"):
            name = getattr(config, key)
            if name is not None and columns is not None and name not in columns:
                raise DataError(f"data.{key} = {name!r}: {config.path} has columns {', '.join(columns)}")
        if config.id and not config.streaming and len(self._rows.unique(config.id)) < len(self._rows):
            raise DataError(f"data.id = {config.id!r}: rows of {config.path} share ids")
        if config.teacher and not config.streaming and not self._all_are_known(config.teacher):
            for row in self._numbered(self._rows):
                self._teacher(self._id(row), row)

    def __len__(self) -> int:
        """Rows of one epoch; a streaming set has no length and raises TypeError."""
        return len(self._rows)

    def __iter__(self) -> Iterator[Prompt]:
        epoch = 0
        while self._config.epochs is None or epoch < self._config.epochs:
            served = 0
            for row in self._shuffled(epoch):
                prompt = self.prompt(row, epoch)
                if prompt is not None:
                    served += 1
                    yield prompt
            if not served:
                raise DataError(f"data.path = {self._config.path!r}: no usable row")
            epoch += 1
        raise DataError(f"data.path = {self._config.path!r}: {epoch} epochs are used up; raise data.epochs")

    def first(self, count: int) -> list[Prompt]:
        """The first `count` prompts in file order, for evaluation."""
        prompts = (self.prompt(row, 0) for row in self._numbered(self._rows))
        found = list(islice((p for p in prompts if p is not None), count))
        if len(found) < count:
            raise DataError(f"eval.path = {self._config.path!r}: {len(found)} usable rows, eval.problems = {count}")
        return found

    def prompt(self, row: dict, epoch: int) -> Prompt | None:
        """Render and tokenize one row."""
        id = f"{self._id(row)}@{epoch}"
        content, answer = row.get(self._config.prompt), row.get(self._config.answer)
        if not isinstance(content, str | list) or not content:
            raise DataError(
                f"row {id}: {self._config.prompt!r} must be a string or a list of messages, got {content!r}"
            )
        if not isinstance(answer, str | int | float):
            raise DataError(f"row {id}: {self._config.answer!r} must be a string or a number, got {answer!r}")
        teacher = self._teacher(id, row)
        view = self._views[teacher]
        ids, teacher_ids = self._tokens(id, content, self._config.template_args), None
        bound = "data.max_prompt_tokens", self._config.max_prompt_tokens
        lengths = [(len(ids), *bound)]
        if view.own:
            shown = view.shown(id, content, row.get(self._config.solution), self._config.solution)
            teacher_ids = self._tokens(id, shown, self._config.template_args | view.template_args)
            lengths.append((len(teacher_ids), *(view.longest or bound)))
        over = [f"{length} prompt tokens, {key} = {limit}" for length, key, limit in lengths if length > limit]
        if over and self._config.long_prompt == "error":
            raise DataError(f'row {id}: {over[0]}; shorten it, raise the limit, or set data.long_prompt = "skip"')
        if over:
            self.skipped.append(id)
            return None
        return Prompt(id=id, ids=ids, answer=str(answer), teacher_ids=teacher_ids, teacher=teacher)

    def _id(self, row: dict) -> str:
        return str(row[self._config.id] if self._config.id else row["_position"])

    def _all_are_known(self, column: str) -> bool:
        """Whether every value is a teacher's name, found without looking at row by row."""
        text = getattr(self._rows.features[column], "dtype", "") in ("string", "large_string")
        return text and self._views.keys() >= set(self._rows.unique(column))

    def _teacher(self, id: str, row: dict) -> str:
        """Name of the teacher that the row is for."""
        if self._config.teacher is None:
            return ""
        name = row.get(self._config.teacher)
        if not isinstance(name, str) or name not in self._views:
            raise DataError(f"row {id}: {wrong(f'data.teacher, column {self._config.teacher!r}', name, self._views)}")
        return name

    def _tokens(self, id: str, content: str | list, template_args: dict) -> np.ndarray:
        if self._config.chat_template:
            messages = [{"role": "user", "content": content}] if isinstance(content, str) else content
            if not all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages):
                raise DataError(
                    f"row {id}: {self._config.prompt!r} holds a message without role or content: {messages!r}"
                )
            try:
                content = self._tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=True, **template_args
                )
            except TemplateError as e:
                raise DataError(f"row {id}: the chat template refuses {self._config.prompt!r}: {e}") from e
        elif isinstance(content, list):
            raise DataError(f"data.prompt = {self._config.prompt!r} holds messages: set data.chat_template = true")
        special = not self._config.chat_template  # a template writes its own
        return np.asarray(self._tokenizer(content, add_special_tokens=special).input_ids, np.int32)

    def _shuffled(self, epoch: int) -> Iterator[dict]:
        seed = self._seed + epoch
        if self._config.streaming:
            return self._numbered(self._rows.shuffle(seed=seed, buffer_size=self._config.shuffle_buffer))
        order = np.random.default_rng(seed).permutation(len(self._rows))
        return ({**self._rows[int(i)], "_position": int(i)} for i in order)

    def _numbered(self, rows) -> Iterator[dict]:
        with _reading(self._config):
            for position, row in enumerate(rows):
                yield {**row, "_position": position}


def _load(config: DataConfig) -> datasets.Dataset | datasets.IterableDataset:
    datasets.disable_progress_bars()
    reader = FILE_READERS.get(Path(config.path).suffix)
    where = {"path": reader, "data_files": config.path} if reader else {"path": config.path}
    with _reading(config):
        return datasets.load_dataset(**where, name=config.subset, split=config.split, streaming=config.streaming)


@contextmanager
def _reading(config: DataConfig) -> Iterator[None]:
    """Names the set in what `datasets` raises, which is StopIteration for an empty file."""
    try:
        yield
    except (OSError, ValueError, StopIteration, datasets.exceptions.DatasetsError) as e:
        cause = str(e.__cause__ or e) or "no rows"  # "an error occurred" has a cause that says which
        raise DataError(f"data.path = {config.path!r}, split {config.split!r}: {cause}") from e
