"""A chat template, with the tokenizer that it is rendered and read by."""

import hashlib
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateSyntaxError
from transformers import PreTrainedTokenizerFast

from async_opd.core.errors import DataError
from async_opd.core.foreign import foreign
from async_opd.roles.rollout.messages import check_rendering


class Template:
    """Makes one text of messages, behind which a response begins."""

    def __init__(
        self, setting: str, tokenizer: PreTrainedTokenizerFast, source: str, called: str = ""
    ):
        """Take the Jinja `source`, which is that of a `setting`, and is `called` so of rows where
        that is shorter; and the `tokenizer` whose special tokens it may write. Raises DataError
        where the source is no Jinja."""
        self.called = called or setting
        self.tokenizer = tokenizer
        self.source = source
        self.sample = ""  # what it makes of one message, where it takes that
        try:
            self.sample = f"{self._text([{'role': 'user', 'content': '?'}], setting, {})}"
        except DataError as e:
            if isinstance(e.__cause__, TemplateSyntaxError):
                raise

    def __repr__(self) -> str:
        """Say what it renders depends on, in a hash."""
        tokenizer = self.tokenizer
        parts = (self.source, tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map)
        return f"{self.called} {hashlib.blake2b(f'{parts}'.encode(), digest_size=16).hexdigest()}"

    def render(self, messages: Sequence[dict[str, Any]], column: str, args: dict[str, Any]) -> str:
        """Render the messages of `column`, with the template's arguments `args`. Raises DataError
        where it refuses them, or leaves one out."""
        text = self._text(messages, f"{self.called} refuses {column!r}", args)
        check_rendering(text, messages, column, template=self.source, called=self.called)
        return str(text)

    def _text(self, messages: Sequence[dict[str, Any]], doing: str, args: dict[str, Any]) -> Any:
        with foreign(doing):
            return self.tokenizer.apply_chat_template(
                list(messages),
                tokenize=False,
                add_generation_prompt=True,
                chat_template=self.source,
                **args,
            )
