"""Token ids to the text that a check reads."""

from collections.abc import Callable
from typing import Any

import numpy as np

from async_opd.roles.verifier.answers.response import is_mark


def decoding(tokenizer: Any, special_tokens: bool) -> Callable[[np.ndarray], str]:
    """Return what turns ids into text by `tokenizer`, of the library tokenizers: with all special
    tokens, or only with those that mark thoughts, so that no check takes a thought for an answer.
    """
    if special_tokens:
        return lambda ids: tokenizer.decode(ids.tolist(), skip_special_tokens=False)
    marks = {
        id: token.content
        for id, token in tokenizer.get_added_tokens_decoder().items()
        if token.special and is_mark(token.content)
    }

    def decode(ids: np.ndarray) -> str:
        listed = ids.tolist()
        places = [place for place, id in enumerate(listed) if id in marks]
        text, start = "", 0
        for place in places:
            text += tokenizer.decode(listed[start:place], skip_special_tokens=True)
            text += marks[listed[place]]
            start = place + 1
        return text + tokenizer.decode(listed[start:], skip_special_tokens=True)

    return decode
