"""The books of a run: an append-only file that knows of every prompt. `async-opd audit` reads
it."""

import asyncio
import os
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import msgspec
from msgspec import Struct

from async_opd.core import files
from async_opd.core.aio import retrieved
from async_opd.core.aside import DaemonThread
from async_opd.core.errors import DataError, LedgerError
from async_opd.core.run_dir import BLOCK, read_back, read_lines

CHECKED = 10_000  # of the last records of a file that is continued


class Record(Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=str.lower):
    """One line, such as ["out",17,"3@0"]. `n` counts the lines from 1, so that none can go
    unnoticed."""

    n: int


class Out(Record, frozen=True):
    """Handed out: new, or again after a resume."""

    id: str


class Trained(Record, frozen=True):
    """The groups of one step."""

    step: int
    ids: list[str]


class Dropped(Record, frozen=True):
    """Dropped for good."""

    id: str
    cause: str


class Reissued(Record, frozen=True):
    """Dropped, and handed out again as attempt `attempt`."""

    id: str
    attempt: int
    cause: str


class Failed(Record, frozen=True):
    """One rollout of a group has failed, by the doing of `role`; the group goes on without it."""

    id: str
    sample: int
    role: str


class Returned(Record, frozen=True):
    """Handed back by a replica that was lost or left; the same attempt goes out again."""

    id: str
    cause: str


class Checkpoint(Record, frozen=True):
    """The driver's state at `step` was taken here."""

    step: int


class Resumed(Record, frozen=True):
    """The run went back to where its checkpoint of `step` was taken: every record since is void. 0:
    to its start."""

    step: int
    outstanding: list[str]  # of the checkpoint, in their old order


class Finished(Record, frozen=True):
    """All steps are done."""


AnyRecord = Out | Trained | Dropped | Reissued | Failed | Returned | Checkpoint | Resumed | Finished


class Ledger:
    """Knows what is handed out and has no end yet, and writes what becomes of it.

    Each call adds a line to a buffer; `sync` puts the buffer on disk. Await it once a step, before
    the step's row of metrics is written, and before a checkpoint is committed: a checkpoint must
    never know more than the ledger.
    """

    def __init__(self, path: Path):
        """Continue a file that is there already, less the torn line that a kill may have left; say
        then where from with `resumed`. Only its end is read: `audit` reads all of it. Raises
        LedgerError for one that cannot be read."""
        self._path = path
        self._n = 0
        # The ids without an end, in the order they were first handed out
        self.outstanding: dict[str, None] = {}
        self._due: set[str] = set()  # of them: to be handed out again after a resume
        self._lines = bytearray()
        self._encode = msgspec.json.Encoder().encode_into
        self._broken: OSError | None = None
        self._writer = DaemonThread("ledger")  # one thread: batches keep their order
        end = 0
        with _naming(path):
            if path.exists():
                end, self._n = _last(path)
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.ftruncate(self._file, end)
            files.sync(path.parent)  # the file's name

    def handed_out(self, id: str) -> None:
        """Note that a prompt is admitted. Raises DataError for one that is out already: two rows
        share its id."""
        if id in self.outstanding and id not in self._due:
            raise DataError(
                f"prompt {id}: handed out while it is outstanding: rows share an id, see data.id"
            )
        self._due.discard(id)
        self.outstanding[id] = None
        self._add(Out(self._next(), id))

    def trained(self, step: int, ids: list[str]) -> None:
        """Note that step `step` trained these groups. One that is not outstanding is a bug and
        raises KeyError."""
        for id in ids:
            del self.outstanding[id]
        self._add(Trained(self._next(), step, ids))

    def dropped(self, id: str, cause: str) -> None:
        """Note that a prompt is dropped for good; one that is not outstanding is a bug and raises
        KeyError."""
        del self.outstanding[id]
        self._due.discard(id)
        self._add(Dropped(self._next(), id, cause))

    def reissued(self, id: str, attempt: int, cause: str) -> None:
        """Note that a prompt's group was dropped; it goes out again as attempt `attempt`."""
        self._add(Reissued(self._next(), id, attempt, cause))

    def failed(self, id: str, sample: int, role: str) -> None:
        """Note that a group goes on without one of its rollouts."""
        self._add(Failed(self._next(), id, sample, role))

    def returned(self, id: str, cause: str) -> None:
        """Note that the replica that had a prompt was lost or has left; the same attempt goes out
        again."""
        self._add(Returned(self._next(), id, cause))

    def checkpoint(self, step: int) -> list[str]:
        """Note that the driver's state is taken now; returns what of it is outstanding. Once a
        step: a second one that is killed before its commit could not be told from the first."""
        self._add(Checkpoint(self._next(), step))
        return list(self.outstanding)

    def resumed(self, step: int, outstanding: Iterable[str]) -> None:
        """Note that the run goes on from the checkpoint of `step`, or from its start for 0, with
        what was `outstanding` then. Later checkpoints must be gone by now, or the next resume could
        take one that is void."""
        self.outstanding = dict.fromkeys(outstanding)
        self._due = set(self.outstanding)
        self._add(Resumed(self._next(), step, list(self.outstanding)))

    def finished(self) -> None:
        """Note that all steps are done."""
        self._add(Finished(self._next()))

    async def sync(self) -> None:
        """Put on disk what was added so far. Raises LedgerError when the disk refuses, then and
        ever after. Its batch is written even where the caller is cancelled."""
        loop = asyncio.get_running_loop()
        await asyncio.shield(
            retrieved(loop.run_in_executor(self._writer, self._write, self._taken()))
        )

    def close(self) -> None:
        """Put the rest on disk and close the file, for as long as that takes. Raises as `sync`
        does."""
        rest = self._writer.submit(self._write, self._taken())
        closing = self._writer.submit(os.close, self._file)  # behind a write that hangs, too
        self._writer.shutdown()
        rest.result()
        closing.result()

    def _next(self) -> int:
        self._n += 1
        return self._n

    def _add(self, record: Record) -> None:
        self._encode(record, self._lines, -1)
        self._lines += b"\n"

    def _taken(self) -> bytearray:
        lines, self._lines = self._lines, bytearray()
        return lines

    def _write(self, lines: bytearray) -> None:
        with _naming(self._path):
            # The batch that failed may have left a torn line: nothing may follow it.
            if self._broken:
                raise self._broken
            try:
                rest = memoryview(lines)
                while rest:
                    rest = rest[os.write(self._file, rest) :]
                os.fsync(self._file)
            except OSError as e:
                self._broken = e
                raise


def records(path: Path) -> Iterator[tuple[int, Record]]:
    """Read every record, with the offset behind its line; a torn last line is none. Raises
    LedgerError for any other line that is none."""

    def refuse(number: int, error: ValueError) -> None:
        raise LedgerError(f"{path}, line {number}: not a record: {error}") from error

    return read_lines(path, msgspec.json.Decoder(AnyRecord).decode, refuse)


def _last(path: Path) -> tuple[int, int]:
    """Find the offset behind the last record, and its `n`; 0 and 0 where there is none. Raises
    LedgerError where one of the last CHECKED is no record, or not the one before the next."""
    last, expected = (0, 0), None
    for end, line in islice(read_back(path), CHECKED):
        try:
            n = msgspec.json.decode(line, type=AnyRecord).n
        except ValueError as error:
            raise LedgerError(
                f"{path}, line {_number(path, end)}: not a record: {error}"
            ) from error
        if expected is None:
            last = end, n
        elif n != expected:
            raise LedgerError(
                f"{path}, line {_number(path, end)}: record {n} stands before record {expected + 1}"
            )
        expected = n - 1
    return last


def _number(path: Path, end: int) -> int:
    """Count the lines of the file up to that offset."""
    with path.open("rb") as file:
        blocks = (file.read(min(BLOCK, end - start)) for start in range(0, end, BLOCK))
        return sum(block.count(b"\n") for block in blocks)


@contextmanager
def _naming(path: Path) -> Generator[None]:
    """Name the ledger in what the disk raises."""
    try:
        yield
    except OSError as e:
        raise LedgerError(f"{path}: {e.strerror or e}") from e
