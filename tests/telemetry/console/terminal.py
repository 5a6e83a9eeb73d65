"""As much of a terminal as a screen needs: text, lines, colours ignored, and three ways to move and
erase."""

import re

SEQUENCE = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])")


def shown(text: str) -> list[str]:
    """Read what stands on an endless terminal after `text`. An unknown sequence is an error."""
    lines = [""]
    row = column = offset = 0
    while offset < len(text):
        if match := SEQUENCE.match(text, offset):
            count, what = match.groups()
            offset = match.end()
            if what == "F":
                row, column = row - int(count), 0
                assert row >= 0, "above the first line"
            elif what == "K":
                lines[row] = lines[row][:column]
            elif what == "J":
                lines[row:] = [lines[row][:column]]
            else:
                assert what == "m", f"{match[0]!r}: never sent"
            continue
        if text[offset] == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        if text[offset] in "\r\n":
            column = 0
        else:
            lines[row] = lines[row][:column].ljust(column) + text[offset] + lines[row][column + 1 :]
            column += 1
        offset += 1
    return lines
