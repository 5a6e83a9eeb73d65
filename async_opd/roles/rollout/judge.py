"""Whether a row can be used: the prompt that it makes, or what is wrong."""

import threading
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from transformers import PreTrainedTokenizerFast

from async_opd.core.errors import DataError
from async_opd.core.wire import Prompt
from async_opd.roles.rollout.config import DataConfig
from async_opd.roles.rollout.encode import Encoder, encoded
from async_opd.roles.rollout.flaws import Flaw
from async_opd.roles.rollout.messages import shown
from async_opd.roles.rollout.render import Rendered, Renderer
from async_opd.roles.rollout.teacher_prompt import TeacherView

LONGEST = 100  # characters of an id, in a message


class References(Protocol):
    """What can tell of references whether a check can use them: `roles.verifier.references`."""

    @property
    def key(self) -> str: ...
    def unusable(self, answers: Sequence[str], stop: threading.Event) -> Mapping[str, str]: ...


class Judge:
    """Judges rows by one config, tokenizer and check."""

    def __init__(
        self,
        config: DataConfig,
        tokenizer: PreTrainedTokenizerFast,
        views: Mapping[str, TeacherView],
        references: References | None,
        *,
        head: int | None = None,
    ):
        """Take what each teacher is shown from `views`. No `references`: answers are taken as they
        are. `head`: rows of the student's, absent: enough. Raises DataError for a template that is
        missing."""
        self.config = config
        self.tokenizer = tokenizer
        self.renderer = Renderer(config, tokenizer, views)
        # by the name of the teacher whose texts they read; that of None reads the student's
        self._encoders: dict[str | None, Encoder] = {
            None: Encoder(tokenizer, raw=not config.chat_template)
        }
        for name, view in views.items():
            if view.template:
                self._encoders[name] = Encoder(view.template.tokenizer, raw=False)
        self._views = views
        self._references = references
        self._head = head
        # what a verdict depends on besides rows, tokenizer and code
        self.key = f"{config} {views} {references.key if references else None} {head}"

    def prompt(self, row: dict, epoch: int) -> Prompt | Flaw:
        """Render and tokenize a row, which has its place as "_position"."""
        if what := self.wrong_id(row):
            return self.flaw(row, what)
        try:
            rendered = self.renderer.rendered(row)
        except DataError as e:
            return self.flaw(row, str(e))
        (ids,) = self.encoded([rendered])
        if wrong := self.wrong(rendered, ids):
            return self.flaw(row, wrong[0], long=wrong[1])
        ours, *theirs = [each for each in ids if not isinstance(each, str)]
        return Prompt(
            id=f"{self.name(row)}@{epoch}",
            ids=ours,
            answer=rendered.answer,
            teacher_ids=theirs[0] if theirs else None,
            teacher=rendered.teacher,
            row=row["_position"],
        )

    def encoded(self, rows: Sequence[Rendered]) -> list[list[np.ndarray | str]]:
        """Encode the texts of rows, the student's before the teacher's; in place of the ids of one
        that cannot be, why."""
        ids: list[list[np.ndarray | str]] = [[] for _ in rows]
        for reader, encoder in self._encoders.items():
            texts = [
                (i, text)
                for i, row in enumerate(rows)
                for text, whose in zip(row.texts, (None, row.teacher), strict=False)
                if reader == (whose if whose in self._encoders else None)
            ]
            read = encoded(encoder, [text for _, text in texts]) if texts else []
            for (i, _), each in zip(texts, read, strict=True):
                ids[i].append(each)
        return ids

    def wrong(self, rendered: Rendered, ids: Sequence[np.ndarray | str]) -> tuple[str, bool] | None:
        """Say what is wrong of the `ids` of a row's texts, in place of which stands why there are
        none; and whether that is their length."""
        view = self._views[rendered.teacher]
        for each, template in zip(ids, (None, view.template), strict=False):
            if isinstance(each, str):
                return f"{self.config.prompt!r}: {each}", False
            if not len(each):
                return f"{self.config.prompt!r} makes no tokens", False
            head = view.head if template else self._head
            if head and (most := int(each.max())) >= head:
                tokenizer = template.tokenizer if template else self.tokenizer
                token = f"{tokenizer.convert_ids_to_tokens(most)!r} ({most})"
                whose = "teacher" if template else "student"
                return f"holds {token}; the {whose}'s head has {head} rows", False
        long = rendered.over([len(each) for each in ids])
        return (long, True) if long else None

    def unusable(self, answers: Sequence[str], stop: threading.Event) -> dict[str, str]:
        """Say of those of `answers` that the check cannot use what is wrong, until `stop` is
        set."""
        if self._references is None:
            return {}
        wrong = self._references.unusable(answers, stop)
        return {answer: f"{self.config.answer!r}: {why}" for answer, why in wrong.items()}

    def wrong_id(self, row: Mapping[str, Any]) -> str | None:
        """Say what is wrong of the id of a row."""
        column = self.config.id
        if column is None or (isinstance(row[column], str | int) and row[column] != ""):
            return None
        return f"{column!r} must be a string or an integer, got {shown(row[column])}"

    def name(self, row: dict) -> str:
        """Read the id of a row: its column's, or its place."""
        return str(row[self.config.id] if self.config.id else row["_position"])

    def flaw(self, row: dict, what: str, *, long: bool = False) -> Flaw:
        """Say what is wrong of a row, which is named on one line, by LONGEST characters."""
        name = " ".join(self.name(row).split())[:LONGEST]
        return Flaw(place=row["_position"], row=name, what=what, long=long)

    def refuses(self, flaw: Flaw) -> bool:
        """Tell whether such a row ends the run, or is left out."""
        return (self.config.long_prompt if flaw.long else self.config.bad_rows) == "error"
