"""Imports that take seconds."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collections() -> Iterator[None]:
    """Keep the garbage collector out of the way of what imports vLLM, torch or transformers.

    Thousands of modules are kept for good, and each full collection meanwhile looks through all that are there: a fifth
    of the time (benchmarks/README.md)."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
