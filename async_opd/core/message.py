"""The base of everything that crosses a process boundary, and the checks of what it holds."""

from collections.abc import Callable
from pickle import PickleBuffer
from typing import Any, cast

import msgspec
import numpy as np
import numpy.typing as npt

from async_opd.core.errors import WireError

LOGP_TOLERANCE = 1e-4  # nats a log-prob may exceed 0 by rounding


class Struct(msgspec.Struct, frozen=True, array_like=True):
    """Base of every message: immutable, pickled (protocol 5) as msgpack without field names, its
    arrays out of band."""

    def __reduce__(self) -> tuple[Callable[..., "Struct"], tuple[Any, ...]]:
        buffers: list[PickleBuffer] = []

        def out_of_band(array: npt.NDArray[Any]) -> tuple[str, tuple[int, ...]]:
            buffers.append(PickleBuffer(np.ascontiguousarray(array).data))
            return array.dtype.char, array.shape

        return _arrive, (type(self), msgspec.msgpack.encode(self, enc_hook=out_of_band), *buffers)


def _arrive(kind: type[Struct], sent: bytes, *buffers: Any) -> Struct:
    """A message of `kind` as `Struct.__reduce__` sent it. Raises WireError where a field has
    another type."""
    left = iter(buffers)

    def array(_: type, form: Any) -> Any:
        match form:
            case [str(dtype), [*shape]]:
                return np.frombuffer(next(left), dtype).reshape(shape)
            case _:  # of another type, which the decoder refuses
                return form

    try:
        return msgspec.msgpack.decode(sent, type=kind, dec_hook=array)
    except msgspec.ValidationError as e:
        id: Any = msgspec.msgpack.decode(sent)
        while isinstance(id, list) and id:  # it begins with its id, or with a message that does
            id = cast("list[Any]", id)[0]
        raise WireError(f"{id}: {kind.__name__}: {e}") from e


def check_array(id: str, field: str, value: Any, dtype: type, ndim: int) -> None:
    """Raise WireError unless `value` is an array of `dtype` with `ndim` axes."""
    shape: tuple[int, ...] | None = getattr(value, "shape", None)
    kind = getattr(value, "dtype", type(value).__name__)
    if shape is None or kind != dtype or len(shape) != ndim:
        got = kind if shape is None else f"{kind} {shape}"
        raise WireError(f"{id}: {field} must be a {ndim}-d {np.dtype(dtype)} array, got {got}")


def check_logp(id: str, field: str, value: Any, shape: tuple[int, ...]) -> None:
    """Raise WireError unless `value` is a float32 array of log-probs of that shape."""
    check_array(id, field, value, np.float32, len(shape))
    if value.shape != shape:
        raise WireError(f"{id}: {field} has shape {value.shape}, expected {shape}")
    if value.size and not (np.isfinite(value).all() and value.max() <= LOGP_TOLERANCE):
        flat = value.ravel()
        place = int(np.argmax(~np.isfinite(flat) | (flat > LOGP_TOLERANCE)))
        raise WireError(f"{id}: {field}[{place}] = {flat[place]} is not a finite log-prob <= 0")


def check_rows(id: str, field: str, value: npt.NDArray[Any], rows: int) -> None:
    """Raise WireError unless `value` has a row for each token."""
    if len(value) != rows:
        raise WireError(f"{id}: {field} has {len(value)} rows for {rows} tokens")
