"""As much of a terminal as a screen needs: text, lines, colours ignored, and three ways to move and
erase."""

import re

# a sequence, by its numbers and its letter, or a character
PIECE = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])|(.)", re.DOTALL)


def shown(text: str) -> list[str]:
    """Read what stands on an endless terminal after `text`. An unknown sequence is an error."""
    lines = [""]
    row = column = 0
    for piece in PIECE.finditer(text):
        match piece.groups():
            case count, "F", _:
                row, column = row - int(count), 0
                assert row >= 0, "above the first line"
            case _, "K", _:
                lines[row] = lines[row][:column]
            case _, "J", _:
                lines[row:] = [lines[row][:column]]
            case _, _, "\r":
                column = 0
            case _, _, "\n":
                row, column = row + 1, 0
                lines += [""] * (row + 1 - len(lines))
            case _, None, character:
                lines[row] = (
                    lines[row][:column].ljust(column) + character + lines[row][column + 1 :]
                )
                column += 1
            case _, unknown, _:
                assert unknown == "m", f"{piece[0]!r}: never sent"
    return lines
