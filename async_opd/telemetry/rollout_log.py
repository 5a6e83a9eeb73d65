"""The file of recorded trajectories, `samples.jsonl`: tokens as text, numbers beside them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from async_opd.core.wire import RecordedTrajectory
from async_opd.telemetry.metrics import Jsonl


def sample_file(
    path: Path, pieces: Callable[[npt.NDArray[np.int32]], list[str]]
) -> Callable[[tuple[RecordedTrajectory, ...]], None]:
    """Make an observer that adds a line for each trajectory to the file at `path`; `pieces` turns
    ids into text."""
    write = Jsonl(path)

    def take(recorded: tuple[RecordedTrajectory, ...]) -> None:
        for trajectory in recorded:
            write(line(trajectory, pieces))

    return take


def line(
    recorded: RecordedTrajectory, pieces: Callable[[npt.NDArray[np.int32]], list[str]]
) -> dict[str, Any]:
    """Put a trajectory into a line: per-token lists by name, as long as `tokens`, numbers to 5
    digits."""
    return {
        "step": recorded.step,
        "id": recorded.id,
        "prompt": "".join(pieces(recorded.prompt_ids)),
        # tokens left out before it
        "prompt_cut": recorded.prompt_tokens - len(recorded.prompt_ids),
        "tokens": pieces(recorded.ids),
        "cut": recorded.tokens - len(recorded.ids),  # tokens left out behind them
        "truncated": recorded.truncated,
        "correct": recorded.correct,
        **{
            name: [float(f"{x:.5g}") for x in value.tolist()]
            for name, value in recorded.numbers.items()
        },
    }


def decoder(tokenizer: Any) -> Callable[[npt.NDArray[np.int32]], list[str]]:
    """Make what decodes ids one by one, by a `tokenizers.Tokenizer`; what only several spell
    together stands with the last."""
    from tokenizers.decoders import DecodeStream

    def pieces(ids: npt.NDArray[np.int32]) -> list[str]:
        stream = DecodeStream(skip_special_tokens=False)
        return [stream.step(tokenizer, id) or "" for id in ids.tolist()]

    return pieces
