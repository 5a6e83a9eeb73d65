"""One run of the main loop: how it begins, and how it ends."""

import asyncio
import sys
from pathlib import Path

from async_opd.config.schema import Config
from async_opd.core.aio import first_cause, within
from async_opd.core.aside import aside
from async_opd.core.errors import (
    AsyncOpdError,
    CheckpointNotSaved,
    LedgerError,
    TimedOut,
)
from async_opd.core.events import EventSink
from async_opd.core.foreign import foreign
from async_opd.core.roles import Roles
from async_opd.core.run_dir import LEDGER
from async_opd.core.wire import Prompt
from async_opd.driver import resize
from async_opd.driver.checkpoints import Checkpoint, thread_of
from async_opd.driver.ledger import Ledger
from async_opd.driver.resume import Source
from async_opd.driver.train_loop import TrainLoop
from async_opd.telemetry.metrics import Meter, Row


async def train(
    config: Config,
    roles: Roles,
    source: Source,
    held_out: list[Prompt],
    run_dir: Path,
    meter: Meter,
    emit: EventSink = lambda what, who, why: None,
    checkpoint: Checkpoint | None = None,
) -> Row:
    """Run the whole job, or from `checkpoint` on; returns what `summary.json` says of it. `emit` is
    told who was lost and who came. Raises the named error that ended it: the first.

    On cancellation (Ctrl-C), and behind any named error, what is trained is saved before it
    propagates, while every learner rank answers; why it is not, where it is not, is a note of the
    error.
    """
    timeout = config.timeout
    thread = thread_of(run_dir)  # behind one that was given up, which cuts the file
    ledger = await aside(timeout.step_s, "ledger, opened", Ledger, run_dir / LEDGER, thread=thread)
    loop = TrainLoop(config, roles, source, held_out, run_dir, meter, emit, ledger)
    try:
        async with asyncio.TaskGroup() as tasks:
            # one task of the others, so that errors stand in the order in which they came
            running = tasks.create_task(_run(loop, tasks, run_dir, checkpoint), name="train")
            await asyncio.wait([running])
        measured = running.result()
        ledger.finished()
    except BaseExceptionGroup as group:
        cause = first_cause(group)
        task = asyncio.current_task()
        if task and task.cancelling():  # something else broke at the same moment
            interrupted = asyncio.CancelledError()
            interrupted.add_note(f"{type(cause).__name__}: {cause}")
            await _save_last(loop, interrupted, timeout.last_save_s, emit)
            raise interrupted from None
        if not (loop.is_over and isinstance(cause, AsyncOpdError)):
            cause.add_note(f"at version {loop.version}")
            if isinstance(cause, AsyncOpdError):
                await _save_last(loop, cause, max(timeout.last_save_s, 2 * timeout.step_s), emit)
            if not (task and task.cancelling()):
                await loop.at_work.settled(timeout.step_s)
            raise cause from None
        measured = loop.held_out.unmeasured(loop.version, cause)
        ledger.finished()
    except asyncio.CancelledError as interrupted:
        await _save_last(loop, interrupted, timeout.last_save_s, emit)
        raise
    finally:
        loop.pools.stop()
        loop.prompts.close()
        first = sys.exception()
        await _close(ledger, timeout.stall_s if first else timeout.step_s, first)
    return {**measured, **meter.summary(), **loop.summary()}


async def _run(
    loop: TrainLoop, tasks: asyncio.TaskGroup, run_dir: Path, checkpoint: Checkpoint | None
) -> Row:
    """Train to the end, among `tasks`; returns the accuracies."""
    await loop.begin(tasks, checkpoint)
    serving = tasks.create_task(resize.serve(run_dir, loop.pools), name="serve scale")
    await loop.run()
    measured = await loop.held_out.end(loop.version)
    loop.pools.stop()
    serving.cancel()
    return measured


async def _save_last(
    loop: TrainLoop, error: BaseException, within_s: float, emit: EventSink
) -> None:
    """Save what is trained, in that time, before `error` is raised; where it cannot be saved, that
    is a note of it, and whatever comes meanwhile, another Ctrl-C among it, ends only the save."""
    loop.pools.stop()
    try:
        async with within(within_s):
            with foreign("the last checkpoint", CheckpointNotSaved):
                await loop.save_last()
        return
    except TimeoutError:
        why = f"the step at hand, or saving, takes more than {within_s:g} s"
    except AsyncOpdError as e:
        why = f"{e}"
    except asyncio.CancelledError:
        why = "it was interrupted"
    emit("not saved", "checkpoint", why)
    if why != f"{error}":
        error.add_note(f"not saved: {why}")
    else:
        error.add_note("not saved")


async def _close(ledger: Ledger, within_s: float, first: BaseException | None) -> None:
    """Put the rest of the books on disk. What the disk refuses then, or does not do in time, is a
    note of the error that ends the run, where there is one."""
    try:
        await aside(within_s, "ledger, closed", ledger.close)
    except (LedgerError, TimedOut) as e:
        if first is None:
            raise
        if f"{e}" != f"{first}":
            first.add_note(f"{type(e).__name__}: {e}")
