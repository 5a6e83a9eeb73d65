"""Foreign errors become one line of ours, whatever they are."""

import asyncio

import pydantic
import pytest

from async_opd.core.errors import ConfigError, DataError
from async_opd.core.foreign import foreign


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("no such\nthing"), "a: no such"),
        (ValueError("no such: \n  thing\nof all"), "a: no such: thing"),
        (OSError(2, "not there"), "a: [Errno 2] not there"),
        (KeyError("x"), "a: KeyError: 'x'"),
        (RecursionError(), "a: RecursionError: RecursionError"),
        (StopIteration(), "a: StopIteration: StopIteration"),
    ],
)
def test_a_foreign_error_is_one_line_that_names_what_was_called(error, line):
    with pytest.raises(DataError) as raised, foreign("a"):
        raise error
    assert str(raised.value) == line
    assert raised.value.__cause__ is error


def test_a_panic_of_a_library_in_rust_is_no_exception_and_is_caught_all_the_same():
    panic = type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})
    with pytest.raises(DataError, match=r"^a row: PanicException: out of range$"), foreign("a row"):
        raise panic("out of range")


def test_an_error_of_pydantic_says_what_is_wrong_not_how_many_things_are():
    class Size(pydantic.BaseModel):
        rows: int
        columns: int

    with pytest.raises(DataError) as raised, foreign("a size"):
        Size(rows="x", columns=1)
    assert str(raised.value).startswith("a size: Input should be a valid integer")


def test_what_ends_a_task_and_errors_of_ours_pass():
    for error in (asyncio.CancelledError(), KeyboardInterrupt(), SystemExit(1), ConfigError("b")):
        with pytest.raises(type(error)) as raised, foreign("a"):
            raise error
        assert raised.value is error
