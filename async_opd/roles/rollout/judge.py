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
        self.encoder = Encoder(tokenizer, raw=not config.chat_template)
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
        ids = encoded(self.encoder, rendered.texts)
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

    def wrong(self, rendered: Rendered, ids: Sequence[np.ndarray | str]) -> tuple[str, bool] | None:
        """Say what is wrong of the `ids` of a row's texts, in place of which stands why there are
        none; and whether that is their length."""
        for each in ids:
            if isinstance(each, str):
                return f"{self.config.prompt!r}: {each}", False
            if not len(each):
                return f"{self.config.prompt!r} makes no tokens", False
            if self._head and (most := int(each.max())) >= self._head:
                token = f"{self.tokenizer.convert_ids_to_tokens(most)!r} ({most})"
                return f"holds {token}; the student's head has {self._head} rows", False
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
