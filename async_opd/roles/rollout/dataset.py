"""Any set that `datasets` loads: read without bars and logs, its errors named."""

import logging
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetsError

from async_opd.core.errors import DataError
from async_opd.core.foreign import foreign
from async_opd.core.process_wide import log_level
from async_opd.roles.rollout.config import FILE_READERS, DataConfig

COLUMNS = ("prompt", "answer", "id", "teacher", "solution")  # settings that name one


def load(config: DataConfig, key: str) -> datasets.Dataset | datasets.IterableDataset:
    """Load the rows of the set that stands in the setting `key`. Raises DataError, too for a column
    that is not there."""
    reader = FILE_READERS.get(Path(config.path).suffix)
    with reading(config, key):
        rows = datasets.load_dataset(  # pyright: ignore[reportCallIssue] its overloads lack `bool`
            reader or config.path,
            name=config.subset,
            data_files=config.path if reader else None,
            split=config.split,
            streaming=config.streaming,  # pyright: ignore[reportArgumentType] as above
        )
    columns = rows.column_names
    for setting, name in named_columns(config).items():
        if columns is not None and name not in columns:
            # columns of the held-out problems are those of [data]
            section = "data" if key == "eval.path" else key.removesuffix(".path")
            raise DataError(
                f"{section}.{setting} = {name!r}: {config.path} has columns {', '.join(columns)}"
            )
    return rows


def named_columns(config: DataConfig) -> dict[str, str]:
    """List the columns that `config` names, by the setting."""
    names = {setting: getattr(config, setting) for setting in COLUMNS}
    return {setting: name for setting, name in names.items() if name is not None}


def places_of(rows: datasets.Dataset, column: str | None, names: Collection[str]) -> list[int]:
    """Find the first row of each of `names` in `column`; absent: names are places."""
    if column is None:
        numbers = (int(name) for name in names if name.isdecimal())
        return [place for place in numbers if place < len(rows)]
    places: dict[str, int] = {}
    for place, name in enumerate(rows[column]):
        if str(name) in names:
            places.setdefault(str(name), place)
    return list(places.values())


def numbered(rows: Iterable[Any], config: DataConfig, key: str) -> Iterator[dict]:
    """Give rows in file order with their positions; those of a stream are read here."""
    counted = enumerate(rows)
    while True:
        with reading(config, key):
            item = next(counted, None)
        if item is None:
            return
        yield {**item[1], "_position": item[0]}


@contextmanager
def reading(config: DataConfig, key: str) -> Iterator[None]:
    """Name the set in what `datasets` raises, which is StopIteration for an empty file, and keep
    it from bars and logs meanwhile: what it logs of a broken file, it raises too."""
    with ExitStack() as undo:
        if not datasets.are_progress_bars_disabled():
            undo.callback(datasets.enable_progress_bars)
            datasets.disable_progress_bars()
        undo.enter_context(log_level(logging.CRITICAL, logging.getLogger("datasets")))
        undo.enter_context(foreign(f"{key} = {config.path!r}, split {config.split!r}"))
        try:
            yield
        except StopIteration as e:
            raise ValueError("no rows") from e
        except DatasetsError as e:  # of "An error occurred" the cause says which
            raise (e.__cause__ or e) from None
