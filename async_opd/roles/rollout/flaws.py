"""What is wrong of rows, in words, and kept on disk beside the rows that `datasets` keeps."""

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import datasets.config
import msgspec
from msgspec import Struct
from transformers import PreTrainedTokenizerFast

from async_opd.core.errors import DataError
from async_opd.core.files import write_file

FIRST = 10  # are named at once
LIBRARIES = ("transformers", "tokenizers", "jinja2", "datasets", "math-verify")


class Flaw(Struct, frozen=True, kw_only=True):
    """Why a row cannot be used."""

    place: int  # of the row in its set, from 0
    row: str  # its id, or its place
    what: str
    long: bool = False  # it is over a bound in tokens, and nothing else


def refusal(key: str, path: str, flaws: Sequence[Flaw], of: int | None = None) -> DataError:
    """Make the error that names the first FIRST of `flaws`, those alike together, and the file that
    it writes of more. They are of `of` rows of the set `path`; None: of one read row by row."""
    rows: dict[str, list[str]] = {}
    for flaw in flaws[:FIRST]:
        rows.setdefault(flaw.what, []).append(flaw.row)
    named = "; ".join(
        f"row{'s' if len(names) > 1 else ''} {', '.join(names)}: {what}"
        for what, names in rows.items()
    )
    if of is not None and len(flaws) > 1:
        named = f"{len(flaws)} of {of} rows cannot be used: {named}"
    if len(flaws) > FIRST:
        lines = b"".join(map(_line, flaws))
        file = _write(f"refused-{hashlib.blake2b(lines, digest_size=8).hexdigest()}", lines)
        named += f"; and {len(flaws) - FIRST} more{f', all of them in {file}' if file else ''}"
    if any(flaw.long for flaw in flaws):
        named += '; shorten it, raise the limit, or set data.long_prompt = "skip"'
    if not all(flaw.long for flaw in flaws):
        named += '; data.bad_rows = "skip" leaves such rows out'
    return DataError(f"{key} = {path!r}: {named}")


def key_of(content: str, tokenizer: PreTrainedTokenizerFast, judged_by: str) -> str:
    """Hash the `content` of rows, the tokenizer with its template, the settings `judged_by`, and
    the code that judges."""
    digest = hashlib.blake2b(digest_size=20)
    code = (path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    backend, template = tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template
    words = [content, judged_by, backend, f"{template} {tokenizer.special_tokens_map}"]
    words += [version(library) for library in LIBRARIES]
    for part in (*code, *map(str.encode, words)):
        digest.update(hashlib.blake2b(part).digest())
    return digest.hexdigest()


def keep(key: str, flaws: Mapping[int, Flaw]) -> Path | None:
    """Write the flaws of a whole set with the hash `key`, a line each; returns the file, None where
    the disk does not take it: they are looked for again then."""
    return _write(key, b"".join(_line(flaws[place]) for place in sorted(flaws)))


def kept(key: str) -> tuple[Path, dict[int, Flaw]] | None:
    """Read the flaws of a set that was looked at before, and name their file; None where it was
    not."""
    path = _path(key)
    with suppress(OSError, msgspec.DecodeError):
        flaws = [msgspec.json.decode(line, type=Flaw) for line in path.read_bytes().splitlines()]
        return path, {flaw.place: flaw for flaw in flaws}
    return None


def _line(flaw: Flaw) -> bytes:
    return msgspec.json.encode(flaw) + b"\n"


def _path(name: str) -> Path:
    return Path(datasets.config.HF_DATASETS_CACHE) / "async_opd_rows" / f"{name}.jsonl"


def _write(name: str, lines: bytes) -> Path | None:
    path = _path(name)
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, lines)
        return path
    return None
