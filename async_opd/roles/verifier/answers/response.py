r"""Where the answer stands in a response: after the thoughts, in the last `\boxed{…}`."""

import re

from async_opd.core.errors import DataError

# What opens and closes the thoughts of the families of models.
OPEN = re.compile(
    r"<(?:seed:)?(?:think(?:ing)?|thoughts?|reasoning|reflection|scratchpad)>|\[THINK\]|◁think▷"
    r"|<\|begin_of_thought\|>|<\|start_thinking\|>|<\|channel\|>analysis",
    re.IGNORECASE,
)
CLOSE = re.compile(
    r"</(?:seed:)?(?:think(?:ing)?|thoughts?|reasoning|reflection|scratchpad)>|\[/THINK\]|◁/think▷"
    r"|<\|end_of_thought\|>|<\|end_thinking\|>|<\|channel\|>final",
    re.IGNORECASE,
)
BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace is text, not structure
MOST_BOXES = 32  # that are looked at, from the last
# Between boxes that make one list.
BETWEEN = re.compile(
    r"(?:\s|\$|\\[,;:! ]|\\\(|\\\)|[,;.&*/|—–-]|\d++[.)]|\([a-z]\)|\band\b|\bor\b|\\q?quad"
    r"|\\text\s*+\{\s*+,?\s*+(?:and|or|,)?\s*+\})*+"
)
STATED = re.compile(r"\banswer\s*+(?:is|are|:|=|\*\*:?)++\s*+(?:\*\*)?\s*+(?=\S)", re.IGNORECASE)

FINAL = re.compile(r"^#{4}\s*([^\n]+)", re.MULTILINE)  # as GSM8K marks answers


def is_mark(token: str) -> bool:
    """Tell whether a special token opens or closes thoughts, alone or with the word behind it."""
    return token == "<|channel|>" or any(mark.fullmatch(token) for mark in (OPEN, CLOSE))


def after_thoughts(text: str) -> str:
    """Cut off what is thought rather than said; thoughts that never end leave nothing behind."""
    closed = list(CLOSE.finditer(text))
    text = text[closed[-1].end() :] if closed else text
    if opened := OPEN.search(text):
        return text[: opened.start()]
    return text


def boxes(text: str) -> list[str]:
    r"""Read what the last `\boxed{…}` holds, after what those hold that stand in a list with it; ""
    for one that is never closed."""
    listed: list[str] = []
    following = len(text)
    for box in reversed(list(BOX.finditer(text))[-MOST_BOXES:]):
        content, end = _content(text, box.end())
        if listed and end > following:  # a box around the one before
            continue
        if listed and not BETWEEN.fullmatch(text, end, following):
            break
        if content not in listed:
            listed.insert(0, content)
        following = box.start()
    return listed


def last_boxed(text: str) -> str | None:
    r"""Read what the last `\boxed{…}` holds: "" if it is never closed, None if there is none."""
    listed = boxes(text)
    return listed[-1] if listed else None


def stated(text: str) -> str | None:
    """Read what follows the last "answer is" or "answer:" of `text`, to the end of the sentence, or
    the last ####."""
    lines = [text[match.end() :] for match in [*STATED.finditer(text)][-1:]] or FINAL.findall(text)
    if not lines:
        return None
    line = lines[-1].partition("\n")[0]
    return re.split(r"[.!]\s+(?=[A-Z])|[.!]\s*$", line)[0].strip().strip("*").strip()


def reference_text(answer: str) -> str:
    r"""Take the text of a reference answer: what its last `\boxed{…}` holds, what stands behind its
    last ####, or all of it. Raises DataError for one that no response could match."""
    content, marked = last_boxed(answer), FINAL.findall(answer)
    wanted = content if content is not None else (marked[-1] if marked else answer).strip()
    depth = 0
    for brace in BRACE.finditer(wanted):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth < 0:
            break
    if depth or not wanted.strip("$ \t\n"):
        why = "its braces do not match" if depth else "it is empty"
        raise DataError(f"reference answer {answer[:200]!r} does not parse: {why}")
    return wanted


def boxed(text: str) -> str:
    """Box `text`; nothing stays nothing."""
    return text and f"\\boxed{{{text}}}"


def _content(text: str, start: int) -> tuple[str, int]:
    """Read what stands from `start` to the brace that closes, and where that is."""
    depth = 1
    for brace in BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[start : brace.start()].strip(), brace.end()
    return "", len(text)
