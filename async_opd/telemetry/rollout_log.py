"""The file of recorded trajectories, `samples.jsonl`: tokens as text, numbers beside them."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from async_opd.core.recorded import RecordedTrajectory
from async_opd.core.run_dir import EARLIER_SAMPLES
from async_opd.telemetry.metrics import Jsonl, Rotating

TOKENS = 500  # of a response whose numbers are kept, as many as a report shows
DIGITS = 3  # of a number, and of the largest in its column: what is beside it is not told finer
Pieces = Callable[[npt.NDArray[np.int32]], list[str]]
NONE: Mapping[str, Pieces] = {}
MOST_BYTES = 32 * 2**20  # of the file, before it becomes the earlier one


def sample_file(
    path: Path,
    pieces: Pieces,
    most_bytes: int = MOST_BYTES,
    *,
    theirs: Mapping[str, Pieces] = NONE,
) -> Callable[[tuple[RecordedTrajectory, ...]], None]:
    """Make an observer that adds a line for each trajectory to the file at `path`, which becomes
    the earlier one where it holds `most_bytes`; `pieces` turns ids into text, `theirs` those of a
    prompt that a teacher of that name read by its own tokenizer."""
    write = Rotating(path, EARLIER_SAMPLES, most_bytes, Jsonl(path, msgspec.json.encode))

    def take(recorded: tuple[RecordedTrajectory, ...]) -> None:
        for trajectory in recorded:
            write(line(trajectory, pieces, theirs))

    return take


def line(
    recorded: RecordedTrajectory, pieces: Pieces, theirs: Mapping[str, Pieces] = NONE
) -> dict[str, Any]:
    """Put a trajectory into a line: numbers by name, a list of those of the first TOKENS tokens, or
    one number where they are all alike."""
    shown, read = recorded.teacher_prompt_ids, theirs.get(recorded.teacher, pieces)
    return {
        "step": recorded.step,
        "id": recorded.id,
        "prompt": "".join(pieces(recorded.prompt_ids)),
        "prompt_tokens": recorded.prompt_tokens,
        # tokens left out before it
        "prompt_cut": recorded.prompt_tokens - len(recorded.prompt_ids),
        # as its teacher read it, where that was another
        **({} if shown is None else {"teacher_prompt": "".join(read(shown))}),
        "tokens": pieces(recorded.ids),
        "cut": recorded.tokens - len(recorded.ids),  # tokens left out behind them
        "truncated": recorded.truncated,
        "kept_kv": recorded.kept_kv,
        "reward": recorded.reward,
        **{name: _column(value[:TOKENS]) for name, value in recorded.numbers.items()},
    }


def _column(values: npt.NDArray[np.float32]) -> list[float | None] | float | None:
    """Shorten numbers to DIGITS, unless all are whole ones; None is what is not finite."""
    largest = float(np.abs(values[np.isfinite(values)]).max(initial=0))
    decimals = DIGITS - math.floor(math.log10(largest)) if largest else 0

    def short(x: float) -> float | None:
        rounded = round(float(f"{x:.{DIGITS}g}"), decimals) if math.isfinite(x) else None
        return int(rounded) if rounded is not None and rounded.is_integer() else rounded

    whole = np.isfinite(values).all() and (values == values.round()).all()
    column = [int(x) if whole else short(x) for x in values.tolist()]
    return column[0] if column and len(set(column)) == 1 else column


def decoder(tokenizer: Any) -> Pieces:
    """Make what decodes ids one by one, by a `tokenizers.Tokenizer`; what only several spell
    together stands with the last."""
    from tokenizers.decoders import DecodeStream

    def pieces(ids: npt.NDArray[np.int32]) -> list[str]:
        stream = DecodeStream(skip_special_tokens=False)
        return [stream.step(tokenizer, id) or "" for id in ids.tolist()]

    return pieces
