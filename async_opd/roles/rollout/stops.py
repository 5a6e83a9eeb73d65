"""What ends a response besides the model's own end tokens."""

from collections.abc import Callable, Sequence

from async_opd.core.wire import Ints


def stop_tokens(
    stopped_by: int | str | None,
    ids: Ints,
    stops: Sequence[int | str],
    decode: Callable[..., str],
) -> int:
    """Count the last of `ids` that spell what of `stops` the response was `stopped_by`; 0 where it
    was something else."""
    if not isinstance(stopped_by, str):
        return int(stopped_by is not None and ids[-1] in stops)
    spelled = (
        tokens
        for tokens in range(1, len(ids) + 1)
        if stopped_by in decode(ids[-tokens:], skip_special_tokens=False)
    )
    return next(spelled, len(ids))
