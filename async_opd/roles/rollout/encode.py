"""Texts to token ids, by a tokenizer's own backend: a batch on every core, without the GIL."""

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerFast

from async_opd.core.errors import DataError
from async_opd.core.foreign import foreign


class Encoder:
    """Makes ids of texts. A raw prompt gets the special tokens that the tokenizer puts before it,
    once, and none of those that it appends: a response would begin behind its end. A template
    writes its own."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, *, raw: bool):
        """Take the backend of `tokenizer`; `raw` texts come from no template."""
        self._backend = tokenizer.backend_tokenizer
        # a tokenizer's file may ask for either, and transformers obeys neither
        self._backend.no_truncation()
        self._backend.no_padding()
        self._raw = raw
        self._adds = raw and self._backend.num_special_tokens_to_add(False) > 0

    def __call__(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode `texts` to int32 ids, each (tokens,). Raises DataError, which does not say of
        which text: of several, encode one by one then."""
        with foreign("the tokenizer refuses the text"):
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=self._raw)
            ids = [np.asarray(encoding.ids, np.int32) for encoding in encodings]
            if not self._adds:
                return ids
            return [
                _begun_once(each, encoding.sequence_ids)
                for each, encoding in zip(ids, encodings, strict=True)
            ]


def _begun_once(ids: np.ndarray, sequence_ids: list[int | None]) -> np.ndarray:
    """Cut off what was appended to a text, whose own tokens have a sequence; and what was put
    before it, where it begins so itself."""
    of_text = [place for place, sequence in enumerate(sequence_ids) if sequence is not None]
    if not of_text:
        return ids[:0]
    before, behind = of_text[0], of_text[-1] + 1
    doubled = behind >= 2 * before and np.array_equal(ids[:before], ids[before : 2 * before])
    return ids[before if doubled else 0 : behind]


def encoded(encoder: Encoder, texts: Sequence[str]) -> list[np.ndarray | str]:
    """Encode `texts`; in place of the ids of one that cannot be, why."""
    try:
        return [*encoder(texts)]
    except DataError as e:
        if len(texts) == 1:
            return [str(e)]
        return [encoded(encoder, [text])[0] for text in texts]
