"""What the rows of a set hold, known by a hash: a run goes on with the data that it began with."""

import hashlib
from collections.abc import Mapping
from typing import Any

import datasets
import msgspec
import pyarrow as pa

from async_opd.core.errors import DataError
from async_opd.roles.rollout.config import DataConfig
from async_opd.roles.rollout.dataset import named_columns

HASHED = 1000  # rows in memory while all are hashed


class Content:
    """The rows that were read so far, of those columns that a config names."""

    def __init__(self, config: DataConfig):
        self._columns = columns_of(config)
        self._digest = hashlib.blake2b(digest_size=20)
        self._encode = msgspec.json.Encoder(enc_hook=str).encode

    def add(self, row: dict[str, Any]) -> None:
        """Count one more row to it."""
        self._digest.update(self._encode([row.get(name) for name in self._columns]))

    @property
    def hash(self) -> str:
        """The same for the same rows in the same order."""
        return self._digest.hexdigest()


def columns_of(config: DataConfig) -> list[str]:
    """List the columns that `config` names, each once."""
    return list(dict.fromkeys(named_columns(config).values()))


def content_of(rows: datasets.Dataset, config: DataConfig) -> str:
    """Hash all `rows`, whatever pieces they lie in on this machine."""
    content = Content(config)
    table = rows.select_columns(columns_of(config)).with_format("arrow")
    for start in range(0, len(rows), HASHED):
        piece: pa.Table = table[start : start + HASHED]
        for row in piece.to_pylist():
            content.add(row)
    return content.hash


def refuse_other(
    name: str, position: Mapping[str, Any], content: str, rows: int | None = None
) -> None:
    """Raise DataError where the set `name` has not the content, or the number of rows, that it had
    at `position`."""
    if position["rows"] != rows:
        raise DataError(f"{name}: {rows} rows, it had {position['rows']} before")
    if position.get("content", content) != content:
        raise DataError(
            f"{name}: its rows are not those that the run has read so far: a run goes on with the"
            " data that it began with"
        )
