"""One run from its config, or from its last checkpoint, to its run directory."""

import asyncio
import gc
import json
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from async_opd.config.load import read_run
from async_opd.config.precision import refuse_on_gpus
from async_opd.config.schema import Config
from async_opd.core.aside import aside
from async_opd.core.errors import CheckpointError, SystemFailed
from async_opd.core.events import EventSink
from async_opd.core.files import write_file
from async_opd.core.foreign import foreign
from async_opd.core.printing import say
from async_opd.core.process_wide import no_garbage_collection
from async_opd.core.run_dir import (
    CHECKPOINTS,
    CONFIG,
    EARLIER_EVENTS,
    ENVIRONMENT,
    EVENTS,
    METRICS,
    NEXT,
    SAMPLES,
    SPANS,
    SUMMARY,
)
from async_opd.core.run_lock import locked
from async_opd.driver import checkpoints
from async_opd.driver.train import train
from async_opd.launch.new_run import environment, new_dir
from async_opd.launch.restarts import LOST, Restarts, not_again
from async_opd.launch.signals import interrupted_by_signal
from async_opd.launch.toy_models import resolve_toy
from async_opd.runtime.actor_specs import ActorSpecs
from async_opd.runtime.address import refuse_unreachable
from async_opd.runtime.cluster import Cluster
from async_opd.runtime.prometheus import gauge
from async_opd.runtime.servers import look_at_all
from async_opd.telemetry.console import console
from async_opd.telemetry.metrics import (
    CLOSE_S,
    Jsonl,
    Meter,
    Rotating,
    Row,
    Sink,
    caught_up,
    observed,
)
from async_opd.telemetry.rollout_log import decoder, sample_file
from async_opd.telemetry.sinks import Prometheus, TensorBoard, Wandb
from async_opd.telemetry.spans import Window, encode

if TYPE_CHECKING:
    from async_opd.launch.inputs import Inputs

T = TypeVar("T")

EVENTS_BYTES = 16 * 2**20  # of the file, before it becomes the earlier one


async def run(config: Config, checkpoint: checkpoints.Checkpoint | None = None) -> Row:
    """Train as `config` says, from the start or from a `checkpoint` of its run directory; returns
    what is written to `summary.json`.

    A run that loses what it cannot do without, such as a learner rank, starts again from its newest
    checkpoint, or from the beginning while there is none, at most `run.max_restarts` times within
    `run.restart_steps` steps. Until it ends it holds the lock of its directory, and SIGTERM is as
    Ctrl-C. Raises RunInUse."""
    with interrupted_by_signal() as task:
        run_dir = Path(config.run.dir)
        with locked(run_dir, "train --resume") if checkpoint else new_dir(run_dir, config, "train"):
            try:
                return await _run(config, run_dir, checkpoint, task)
            except asyncio.CancelledError as e:
                if not checkpoints.committed(run_dir / CHECKPOINTS):
                    e.add_note("no checkpoint was saved: there is nothing to go on from")
                raise


async def _run(
    config: Config,
    run_dir: Path,
    checkpoint: checkpoints.Checkpoint | None,
    task: asyncio.Task[Any],
) -> Row:
    """Read the inputs, then train until it succeeds or is not to be started again."""
    asked, config = config, resolve_toy(config, run_dir)
    refuse_unreachable()
    inputs = await _read(config)
    if checkpoint and not config.data.streaming:  # before anything starts
        _refuse_other_set(checkpoint, inputs)
    begin = partial(_write_beginning, run_dir, asked, inputs, resumed=checkpoint is not None)
    await _on_disk(config, run_dir, begin)
    say(f"run directory {run_dir}; starting {_roster(config)}")
    samples = {"samples": partial(_sample_file, run_dir, inputs)}
    with (
        closing(inputs.prompts),
        observed(_sinks(config, run_dir)) as sinks,
        observed(_records(config, run_dir) | samples) as (log, spans, shown, record),
    ):
        observers = [*sinks, shown]

        def emit(what: str, who: str, why: str) -> None:
            event = dict(time=time.time(), step=meter.last_step, what=what, who=who, why=why)
            log(event)
            if what != "placed":  # of each member, for those who look for it
                shown(event)

        restarts = Restarts(config, run_dir, inputs.prompts.position, emit)
        while True:
            try:
                meter = Meter(
                    observers, spans=spans if config.run.trace_steps else None, record=record
                )
                if checkpoint:  # what is told until it goes on belongs behind that step, too
                    meter.start(checkpoint.state.version)
                summary = await _trained(config, inputs, run_dir, meter, emit, checkpoint, restarts)
                break
            except LOST as e:
                if task.cancelling():
                    raise
                with not_again(e):
                    checkpoint = await restarts.goes_on_from(e, meter.last_step, checkpoint)
                    # what they have not written yet would stand behind the rows that are void
                    await aside(2 * CLOSE_S, "observers", caught_up, [*observers, record])
                    asked = await _on_disk(config, run_dir, _asked_since, run_dir, asked)
                config = resolve_toy(asked, run_dir)
    lost = {f"observer_rows_lost_{observer.name}": observer.lost for observer in observers}
    summary |= {
        **inputs.prompts.counts,
        "observer_rows_lost": sum(lost.values()),
        **lost,
        "version": config.run.steps,
        "restarts": restarts.count,
    }
    content = json.dumps(summary, indent=2).encode()
    await _on_disk(config, run_dir / SUMMARY, write_file, run_dir / SUMMARY, content)
    return summary


def _refuse_other_set(checkpoint: checkpoints.Checkpoint, inputs: "Inputs") -> None:
    """Raise DataError where the data set is not the one that the checkpoint was made with, and
    CheckpointError where that does not say how far it was read."""
    with foreign(f"{checkpoint.folder}: the position of its prompts", CheckpointError):
        inputs.prompts.continued(checkpoint.state.position, [])


def _write_beginning(run_dir: Path, asked: Config, inputs: "Inputs", *, resumed: bool) -> None:
    """Write what the run is made with. That of a resume, its config as asked besides, is the run's
    once it has gone on; the config of a new run is there, by `new_dir`."""
    sources = {template.called: template.source for template in inputs.templates.values()}
    templates = {"chat_templates": sources} if sources else {}
    made_with = json.dumps(environment(ends=inputs.tokens.ends, **templates), indent=2).encode()
    write_file(run_dir / (NEXT[ENVIRONMENT] if resumed else ENVIRONMENT), made_with)
    if resumed:  # as asked: where a job unpacks what is shipped is gone when it is gone on with
        write_file(run_dir / NEXT[CONFIG], msgspec.json.format(msgspec.json.encode(asked)))


def _sample_file(run_dir: Path, inputs: "Inputs") -> Callable[..., None]:
    """Make the observer that writes samples, each prompt by the tokenizer of whoever reads it."""
    pieces = decoder(inputs.tokenizer.backend_tokenizer)
    theirs = {n: decoder(t.tokenizer.backend_tokenizer) for n, t in inputs.templates.items()}
    return sample_file(run_dir / SAMPLES, pieces, theirs=theirs)


def _asked_since(run_dir: Path, asked: Config) -> Config:
    """Read the config as `asked`, with the pool sizes that were asked for meanwhile; nobody can ask
    for any before a resume has gone on."""
    return asked if (run_dir / NEXT[CONFIG]).exists() else read_run(run_dir)


async def _on_disk(config: Config, path: Path, call: Callable[..., T], *args: Any) -> T:
    with foreign(f"{path}: cannot be read or written", SystemFailed):
        return await aside(config.timeout.step_s, f"{path}", call, *args)


async def _read(config: Config) -> "Inputs":
    """Read the inputs, and look at the servers that are to be asked. Raises ConfigError and
    DataError."""
    with no_garbage_collection():
        from async_opd.launch.inputs import read

    inputs = read(config)
    if config.served:
        with ExitStack() as undo:
            undo.callback(inputs.prompts.close)
            tokenizer = inputs.tokenizer.backend_tokenizer
            specs = ActorSpecs(config, tokens=inputs.tokens, tokenizer=tokenizer, first_seed=0)
            await look_at_all(config, specs)
            undo.pop_all()
    return inputs


async def _trained(
    config: Config,
    inputs: "Inputs",
    run_dir: Path,
    meter: Meter,
    emit: EventSink,
    checkpoint: checkpoints.Checkpoint | None,
    restarts: Restarts,
) -> Row:
    """Start the actors, and train with them to the end. `restarts` hears that they are ready."""
    inputs.prompts.tell = partial(emit, "left out", "row")
    if checkpoint is None and inputs.prompts.left_out_words:
        emit("left out", "rows", inputs.prompts.left_out_words)
    with Cluster(
        config,
        tokens=inputs.tokens,
        tokenizer=inputs.tokenizer.backend_tokenizer,
        first_seed=config.run.seed + 1000 * (checkpoint.state.version if checkpoint else 0),
        emit=emit,
    ) as cluster:
        started, config = time.monotonic(), cluster.config
        if cluster.gpus:
            refuse_on_gpus(config, inputs.heads)
        roles = await cluster.roles()
        restarts.ready = True
        say(f"every actor is ready after {time.monotonic() - started:.0f} s")
        gc.collect()
        # each full collection would look through all that was imported: 0.2 s, half of the driver's
        # CPU
        gc.freeze()
        try:
            return await train(
                config, roles, inputs.prompts, inputs.held_out, run_dir, meter, emit, checkpoint
            )
        finally:
            gc.unfreeze()  # what is frozen at exit, triton's bindings report as leaked, in 40 lines
            meter.flush()


def _roster(config: Config) -> str:
    """List in words whom a run starts."""
    scorers = (
        f"{section.replace('teachers.', 'teacher ')} in the learner"
        if scorer.backend == "learner"
        else f"{len(scorer.members)} {section.replace('teachers.', 'teacher ')}"
        + (" server(s)" if section in config.served else "(s)")
        for section, scorer in config.scorers.items()
    )
    sampling = config.teacher_sampling
    return (
        f"{config.rollout.generators} generator(s), {', '.join(scorers)}, "
        + (f"{sampling.generators} generator(s) of the teacher's, " if sampling else "")
        + f"{config.verify.workers} verifier process(es), {config.learner.ranks} learner rank(s)"
    )


def _records(config: Config, run_dir: Path) -> dict[str, Callable[[], Sink]]:
    """Name what makes the observers of events and of spans, and the console, which has the rows of
    steps besides."""
    write, events = Jsonl(run_dir / SPANS, encode), run_dir / EVENTS
    return {
        "events": lambda: Rotating(events, EARLIER_EVENTS, EVENTS_BYTES, Jsonl(events)),
        "spans": lambda: Window(run_dir, config.run.trace_steps, write),
        "console": lambda: console(config.run.steps),
    }


def _sinks(config: Config, run_dir: Path) -> dict[str, Callable[[], Sink]]:
    """Name what makes each sink of the rows of steps."""
    kinds = {
        "wandb": Wandb,
        "tensorboard": TensorBoard,
        "prometheus": partial(Prometheus, gauge=gauge),
    }
    asked = {name: partial(kinds[name], config, run_dir) for name in config.run.sinks}
    return {"jsonl": lambda: Jsonl(run_dir / METRICS)} | asked
