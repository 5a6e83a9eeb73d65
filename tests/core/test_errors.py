import pytest

from async_opd.core.errors import first_line


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("no such file\nand a page of advice", "no such file"),
        ("\n  late\n", "late"),
        ("", "OSError"),
    ],
)
def test_an_error_is_shortened_to_a_line_even_where_it_has_none(message, line):
    assert first_line(OSError(message)) == line
