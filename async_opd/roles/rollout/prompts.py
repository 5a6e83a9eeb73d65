"""Prompts from any dataset that `datasets` loads: columns, chat template, tokens, order by seed."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from functools import cached_property
from itertools import chain, islice
from threading import Event
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerFast

from async_opd.core.errors import DataError
from async_opd.core.printing import say
from async_opd.core.wire import Prompt
from async_opd.roles.rollout.config import DataConfig
from async_opd.roles.rollout.content import Content, content_of, refuse_other
from async_opd.roles.rollout.dataset import load, numbered, places_of
from async_opd.roles.rollout.flaws import Flaw, refusal
from async_opd.roles.rollout.judge import Judge, References
from async_opd.roles.rollout.survey import Survey
from async_opd.roles.rollout.teacher_prompt import TeacherView

SURVEY_S = 60.0  # for all rows of a set before the start; what is left is looked at beside it


class PromptSource:
    """An iterator of `Prompt`s over epochs. Each epoch has an order of its own, fixed by `seed` and
    the epoch. It goes on from `position`, which is where it stopped.

    A row that cannot be used, for its columns, its messages, its teacher or its reference, is an
    error where `bad_rows` is "error", a prompt over its bound in either rendering where
    `long_prompt` is; else they count as `left_out` and `skipped`. Raises DataError naming the row,
    by `survey` or when it is read, and when the epochs are used up.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: PreTrainedTokenizerFast,
        *,
        seed: int,
        views: Mapping[str, TeacherView] | None = None,
        references: References | None = None,
        head: int | None = None,
        key: str = "data.path",
    ):
        """Load the rows and check that there are the columns. `views` say by name what each teacher
        is shown (one alone has the name ""); absent: what the student is. Prompts carry the
        teacher's rendering too where it is another. `references` judges the answers where it is
        given; `head`: rows of the student's, absent: enough; `key` is the setting that names the
        set."""
        self._config = config
        self._seed = seed
        self._key = key
        self._name = f"{key} = {config.path!r}"
        views = {"": TeacherView()} if views is None else views
        self._judge = Judge(config, tokenizer, views, references, head=head)
        self._rows = load(config, key)
        self._survey: Survey | None = None
        self.skipped = 0  # prompts that were too long
        self.left_out = 0  # rows that cannot be used
        self.tell: Callable[[str], None] = lambda why: None  # of each that no survey knew
        self._epoch, self._drawn = 0, 0  # how far it was read
        self._drawn_rows = Content(config)  # of this epoch of a stream
        self._rest: Iterator[dict] | None = None  # of an epoch that is continued

    def __len__(self) -> int:
        """Count the rows of one epoch; a streaming set has no length and raises TypeError."""
        return len(self._table)

    @property
    def usable(self) -> int:
        """Count the rows of one epoch without those that are known to be left out."""
        return len(self) - (len(self._survey.flaws) if self._survey else 0)

    @property
    def parts(self) -> dict[str, "PromptSource"]:
        """The sets of which it has the prompts, by the names of their sources: itself."""
        return {"": self}

    @property
    def shares(self) -> dict[str, Fraction]:
        """The share of the prompts that each of `parts` gives."""
        return {"": Fraction(1)}

    def survey(self, poll: Callable[[], None] = lambda: None, share: float = 1.0) -> None:
        """Look at all rows before they are read, for at most that `share` of SURVEY_S, and at the
        rest beside what follows. `poll` is called meanwhile, and what it raises ends it. Raises
        DataError naming those that cannot be used. A stream is not looked at."""
        if not self._config.streaming:
            self._survey = Survey(self._table, self._judge, self._key)
            self._survey.look(share * SURVEY_S, poll)
            if self._survey.ended and not self.usable:
                raise DataError(f"{self._name}: no usable row")

    @property
    def left_out_words(self) -> str:
        """Say how many rows the survey leaves out, and which first; nothing where it leaves out
        none."""
        flaws = sorted(self._survey.flaws.values(), key=lambda f: f.place) if self._survey else []
        if not flaws:
            return ""
        listed = self._survey and self._survey.file
        return (
            f"{len(flaws)} of {len(self)} rows of {self._config.path}, the first: row"
            f" {flaws[0].row}: {flaws[0].what}" + (f"; all of them in {listed}" if listed else "")
        )

    @property
    def counts(self) -> dict[str, int]:
        """How many of the rows that were read are not trained, for `summary.json`."""
        return {"prompts_skipped": self.skipped, "rows_skipped": self.left_out}

    def close(self) -> None:
        """Look at no more rows."""
        if self._survey:
            self._survey.stop()

    def __iter__(self) -> Iterator[Prompt]:
        while self._config.epochs is None or self._epoch < self._config.epochs:
            # Of an epoch that is continued the rows so far have been seen.
            served = bool(self._drawn)
            rows, self._rest = self._rest or self._shuffled(self._epoch, self._drawn), None
            for row in rows:
                prompt = self.prompt(row, self._epoch)
                self._drawn += 1  # not of one that is refused: it comes again
                if self._config.streaming:
                    self._drawn_rows.add(row)
                if prompt is not None:
                    served = True
                    yield prompt
            if not served:
                raise DataError(f"{self._name}: no usable row")
            self._epoch, self._drawn = self._epoch + 1, 0
            self._drawn_rows = Content(self._config)
        raise DataError(f"{self._name}: {self._epoch} epochs are used up; raise data.epochs")

    @property
    def position(self) -> dict[str, Any]:
        """How far the source was read, in plain JSON: where `continued` goes on. Its "epoch" counts
        the passes over all rows that are whole."""
        return {
            "epoch": self._epoch,
            "drawn": self._drawn,
            "skipped": self.skipped,
            "left_out": self.left_out,
            "rows": None if self._config.streaming else len(self),
            "content": self._drawn_rows.hash if self._config.streaming else self._content,
        }

    def continued(self, position: dict[str, Any], outstanding: Sequence[str]) -> Iterator[Prompt]:
        """Give the prompts `outstanding`, which were handed out before, then those that follow
        `position`: the ones that an unbroken iteration would give. Raises DataError for a set that
        has changed since."""
        if not self._config.streaming:
            refuse_other(self._name, position, self._content, len(self))
        self._epoch, self._drawn = position["epoch"], position["drawn"]
        again = self._again(outstanding)
        self._rest = self._drawn_again(position) if self._config.streaming else None
        self.skipped, self.left_out = position["skipped"], position.get("left_out", 0)
        return chain(again, self)

    @cached_property
    def _content(self) -> str:
        """The hash of all rows."""
        return self._survey.content if self._survey else content_of(self._table, self._config)

    def _drawn_again(self, position: dict[str, Any]) -> Iterator[dict]:
        """Read a stream up to `position`; returns the rest of that epoch."""
        rows = self._shuffled(position["epoch"])
        self._drawn_rows = Content(self._config)
        for row in islice(rows, position["drawn"]):
            self._drawn_rows.add(row)
        refuse_other(self._name, position, self._drawn_rows.hash)
        return rows

    def _again(self, ids: Sequence[str]) -> list[Prompt]:
        """Make the prompts of these ids again, in their order."""
        wanted = [(name, int(epoch)) for name, _, epoch in (id.rpartition("@") for id in ids)]
        prompts = {
            f"{self._judge.name(row)}@{epoch}": self.prompt(row, epoch)
            for epoch in dict.fromkeys(epoch for _, epoch in wanted)
            for row in self._of({name for name, its_epoch in wanted if its_epoch == epoch}, epoch)
        }
        for id in ids:
            if prompts.get(id) is None:
                changed = "cannot be used" if id in prompts else "is not there"
                raise DataError(
                    f"row {id}: handed out before, but {changed} now: "
                    f"{self._config.path} has changed"
                )
        return [prompt for id in ids if (prompt := prompts[id]) is not None]

    def _of(self, names: set[str], epoch: int) -> Iterator[dict]:
        """Find the rows of these names, the first of each. A stream is read from the start of the
        epoch until all are there."""
        if self._config.streaming:
            named = (row for row in self._shuffled(epoch) if self._judge.name(row) in names)
        else:
            named = map(self._row, places_of(self._table, self._config.id, names))
        return islice(named, len(names))

    def first(self, count: int | None, poll: Callable[[], None] = lambda: None) -> list[Prompt]:
        """Make the first `count` prompts in file order, or all, for evaluation. `poll` is called
        meanwhile. Raises DataError naming those on the way that cannot be used."""
        rows, prompts = numbered(self._rows, self._config, self._key), list[Prompt]()
        left_out: list[Flaw] = []
        names: set[str] = set()
        while wanted := list(islice(rows, None if count is None else count - len(prompts))):
            flaws = self._flaws(wanted, poll)
            flaws = self._repeated(wanted, names) | flaws
            left_out += [flaws[place] for place in sorted(flaws)]
            fine = [row for row in wanted if row["_position"] not in flaws]
            judged = [self._judge.prompt(row, 0) for row in fine]
            prompts += [each for each in judged if isinstance(each, Prompt)]
        if left_out:
            say(
                f"{self._name}: {len(left_out)} rows left out, the first:"
                f" row {left_out[0].row}: {left_out[0].what}"
            )
            self._leave_out(*left_out)
        if len(prompts) < (count or 1):
            setting = "eval.problems" if self._key == "eval.path" else "problems"
            raise DataError(f"{self._name}: {len(prompts)} usable rows, {setting} = {count or 1}")
        return prompts

    def _repeated(self, rows: list[dict], names: set[str]) -> dict[int, Flaw]:
        """Look for ids that are among `names`, which those of `rows` join."""
        flaws: dict[int, Flaw] = {}
        for row in rows:
            if (name := self._judge.name(row)) in names:
                what = f"its id {self._config.id!r} is also that of an earlier row"
                flaws[row["_position"]] = self._judge.flaw(row, what)
            names.add(name)
        if refused := [flaw for flaw in flaws.values() if self._judge.refuses(flaw)]:
            raise refusal(self._key, self._config.path, refused, of=len(rows))
        return flaws

    def _flaws(self, rows: list[dict], poll: Callable[[], None]) -> dict[int, Flaw]:
        """Look at `rows`, which follow each other."""
        if not self._config.streaming:
            first, last = rows[0]["_position"], rows[-1]["_position"]
            some = self._table.select(range(first, last + 1))
            survey = Survey(some, self._judge, self._key, base=first)
            survey.look(math.inf, poll)
            return survey.flaws
        judged = [(row, self._judge.prompt(row, 0)) for row in rows]
        answers = [each.answer for _, each in judged if isinstance(each, Prompt)]
        wrong = self._judge.unusable(answers, Event())
        flaws = [
            each if isinstance(each, Flaw) else self._judge.flaw(row, wrong[each.answer])
            for row, each in judged
            if isinstance(each, Flaw) or each.answer in wrong
        ]
        if refused := [flaw for flaw in flaws if self._judge.refuses(flaw)]:
            raise refusal(self._key, self._config.path, refused, of=len(rows))
        return {flaw.place: flaw for flaw in flaws}

    def prompt(self, row: dict, epoch: int) -> Prompt | None:
        """Render and tokenize one row; None where it is to be left out."""
        known = None
        if self._survey:
            self._survey.refuse()
            known = self._survey.flaws.get(row["_position"])
        judged = known or self._judge.prompt(row, epoch)
        if isinstance(judged, Prompt):
            return judged
        if self._judge.refuses(judged):
            raise refusal(self._key, self._config.path, [judged])
        self._leave_out(judged)
        if known is None and epoch == 0:
            self.tell(f"{judged.row}: {judged.what}")
        return None

    def _leave_out(self, *flaws: Flaw) -> None:
        self.skipped += sum(flaw.long for flaw in flaws)
        self.left_out += sum(not flaw.long for flaw in flaws)

    @property
    def _table(self) -> datasets.Dataset:
        """The rows, which can be counted and picked. Raises TypeError for those of a stream."""
        if isinstance(self._rows, datasets.IterableDataset):
            raise TypeError(f"{self._name}: a streaming set has no length")
        return self._rows

    def _shuffled(self, epoch: int, start: int = 0) -> Iterator[dict]:
        """Give the rows of an epoch in its order, from the `start`-th on. Those of a stream are
        read to be passed over."""
        seed = self._seed + epoch
        if isinstance(self._rows, datasets.IterableDataset):
            rows = self._rows.shuffle(seed=seed, buffer_size=self._config.shuffle_buffer)
            return islice(numbered(rows, self._config, self._key), start, None)
        order = np.random.default_rng(seed).permutation(len(self))
        return (self._row(int(i)) for i in order[start:])

    def _row(self, position: int) -> dict:
        return {**self._table[position], "_position": position}
