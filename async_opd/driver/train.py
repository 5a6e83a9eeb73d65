"""One run of the main loop: how it begins, and how it ends."""

import asyncio
from pathlib import Path

from async_opd.config.schema import Config
from async_opd.core.aio import first_cause
from async_opd.core.errors import AsyncOpdError, DataError, ScorerDiffers, TooManyDropped
from async_opd.core.events import EventSink
from async_opd.core.roles import Roles
from async_opd.core.wire import Prompt
from async_opd.driver import resize
from async_opd.driver.checkpoints import Checkpoint
from async_opd.driver.resume import Source
from async_opd.driver.train_loop import TrainLoop
from async_opd.telemetry.metrics import Meter, Row

# What ends a run whose learner is sound: what is trained is saved. DataError is of a row.
IN_ORDER = (DataError, TooManyDropped, ScorerDiffers)


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
    told who was lost and who came. Raises the named error that ended it.

    On cancellation (Ctrl-C), and behind an error of IN_ORDER, a checkpoint is saved before it
    propagates.
    """
    loop = TrainLoop(config, roles, source, held_out, run_dir, meter, emit)
    measured: Row = {}
    trained = False  # all of it, and saved
    try:
        async with asyncio.TaskGroup() as tasks:
            await loop.begin(tasks, checkpoint)
            serving = tasks.create_task(resize.serve(run_dir, loop.pools))
            await loop.run()
            trained = True
            measured = await loop.held_out.end(loop.version)
            loop.pools.stop()
            serving.cancel()
        loop.progress.ledger.finished()
    except BaseExceptionGroup as group:
        task = asyncio.current_task()
        if task and task.cancelling():  # something else broke at the same moment
            await loop.interrupted()
            raise asyncio.CancelledError from None
        cause = first_cause(group)
        if not (trained and isinstance(cause, AsyncOpdError)):
            if isinstance(cause, IN_ORDER):
                await loop.interrupted(2 * config.timeout.step_s)
            await loop.settled()
            cause.add_note(f"at version {loop.version}")
            raise cause from None
        measured = loop.held_out.unmeasured(loop.version, cause)
        loop.progress.ledger.finished()
    except asyncio.CancelledError:
        await loop.interrupted()
        raise
    finally:
        loop.pools.stop()
        loop.progress.ledger.close()
    return {**measured, **meter.summary(), **loop.summary()}
