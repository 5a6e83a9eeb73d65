"""Checks of what a plan reads besides the config: shapes from the hub, tokenizers, rows.
Importing this takes seconds."""

import logging
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from msgspec.structs import replace
from transformers import AutoConfig

from async_opd.config.schema import Config
from async_opd.core.errors import DataError
from async_opd.core.foreign import foreign
from async_opd.core.process_wide import log_level
from async_opd.launch import inputs
from async_opd.launch.toy_models import resolve_toy
from async_opd.tools.plan.make import models
from async_opd.tools.plan.shape import Shape, local, of_all, read


def shapes(config: Config) -> dict[str, Shape]:
    """Read the shape of each model, by the model's name. Raises DataError where the hub cannot be
    asked."""
    with _hinting():
        return of_all(
            models(config),
            config.served,
            lambda key, model: (
                local(key, model) or _from_hub(key, model, config.run.trust_remote_code)
            ),
        )


def rows(config: Config) -> None:
    """Check that vocabularies agree, and that the rows can be used. Raises DataError. Training rows
    that are not on this machine are streamed, and the first of each set is looked at: a plan does
    not wait until all of them are here."""
    with _hinting(), TemporaryDirectory() as scratch:
        config = resolve_toy(config, Path(scratch))
        if not all(Path(data.path).exists() for data in config.data.sets.values()):
            data = replace(config.data, streaming=True, shuffle_buffer=1)
            config = replace(config, data=data)
        with closing(inputs.read(config).prompts) as prompts:
            for part in prompts.parts.values():
                next(iter(part))


def _from_hub(key: str, model: str, trust_remote_code: bool) -> Shape:
    """Read the shape of a model of the hub. Raises DataError."""
    with foreign(f"{key} = {model!r}"):
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
        return read(config.to_dict(), key)


@contextmanager
def _hinting() -> Iterator[None]:
    """Add the hint of --offline to a DataError."""
    try:
        # it tells of every try
        with log_level(logging.ERROR, logging.getLogger("huggingface_hub")):
            yield
    except DataError as e:
        raise DataError(
            f"{str(e).rstrip('.')}; with --offline plan asks neither hub nor data, and says what it"
            " skipped"
        ) from e
