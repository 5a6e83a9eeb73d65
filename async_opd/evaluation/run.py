"""One evaluation from its settings to its folder."""

import shutil
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import msgspec
from msgspec.structs import replace

from async_opd.config.evaluation import EvalRun, run_config
from async_opd.config.paths import base_of
from async_opd.config.schema import Config
from async_opd.core.aside import aside
from async_opd.core.errors import CallFailed, ConfigError, first_line
from async_opd.core.ports import Verifier
from async_opd.core.printing import say
from async_opd.core.run_dir import MODEL, PROBLEMS
from async_opd.core.wire import Ballot, GroupMeta, Prompt, Span, Verdict
from async_opd.driver.outcomes import Undecided
from async_opd.driver.replica_pool import ReplicaPool
from async_opd.driver.respond import ALL, of_all, respond
from async_opd.evaluation.result import (
    INTERVAL,
    Problem,
    Result,
    Settings,
    digest,
    figures,
    problem,
    table,
)
from async_opd.launch import inputs
from async_opd.launch.new_run import environment, new_dir
from async_opd.launch.signals import interrupted_by_signal
from async_opd.launch.toy_models import resolve_toy
from async_opd.roles.learner.merge import merge
from async_opd.runtime.address import refuse_unreachable
from async_opd.runtime.cluster import Cluster
from async_opd.telemetry.metrics import Jsonl


async def run_eval(asked: EvalRun) -> Result:
    """Do what is `asked`: read the problems, have them answered, and write the result into the
    folder; returns what is in it too. Until it ends it holds the lock of the folder, and SIGTERM is
    as Ctrl-C."""
    with (
        interrupted_by_signal(),
        new_dir(Path(asked.run.dir), asked, "eval") as folder,
        ExitStack() as undo,
    ):
        undo.callback(shutil.rmtree, folder / MODEL, ignore_errors=True)  # where one was merged
        started = time.monotonic()
        config = await _whole(resolve_toy(run_config(asked), folder), folder)
        refuse_unreachable()
        read = inputs.read_problems(config, asked.problems)
        config = _fitted(config, asked, read.prompts, read.context)
        with Cluster(
            config, tokens=read.tokens, tokenizer=read.tokenizer.backend_tokenizer
        ) as cluster:
            generators, verifiers = await cluster.evaluators()
            say(f"{len(generators)} generator(s) ready after {time.monotonic() - started:.0f} s")
            pools = (
                ReplicaPool("generator", generators, emit=_said),
                ReplicaPool("verifier", verifiers, emit=_said),
            )
            problems = await _problems(config, asked, *pools, read.prompts, folder / PROBLEMS)
        result = _result(config, asked, read, problems, time.monotonic() - started)
        content, file = msgspec.json.format(msgspec.json.encode(result)), folder / "result.json"
        await aside(config.timeout.step_s, f"{file}, written", file.write_bytes, content)
        return result


async def _whole(config: Config, folder: Path) -> Config:
    """Have an adapter merged, beside the result, with the model that it is of: in float32, so that
    nothing is lost before it is known what the generators compute in."""
    model, called = Path(config.student.model), f"student.model = {config.student.model!r}"
    if not base_of(called, model):
        return config
    merged = partial(merge, trust_remote_code=config.run.trust_remote_code)
    await aside(
        config.timeout.start_s,
        f"{called}, merged",
        merged,
        called,
        model,
        folder / MODEL,
        "float32",
    )
    return replace(config, student=replace(config.student, model=str(folder / MODEL)))


def _said(what: str, who: str, why: str) -> None:
    say(f"{who}: {what}: {why}")


def _fitted(config: Config, asked: EvalRun, prompts: list[Prompt], context: int | None) -> Config:
    """Make room in `config` for the longest prompt, and for responses as long as asked for, or as
    the context leaves."""
    longest = max(len(prompt.ids) for prompt in prompts)
    most = asked.rollout.max_new_tokens
    if most is None:
        most = (context or 0) - longest
        if most < 1:
            raise ConfigError(
                f"rollout.max_new_tokens: missing, and the longest prompt has {longest} tokens, the"
                f" context {context or 'an unknown number'}; set it, or data.max_prompt_tokens"
            )
    return replace(
        config,
        data=replace(config.data, max_prompt_tokens=longest),
        rollout=replace(config.rollout, max_new_tokens=most),
    )


async def _problems(
    config: Config,
    asked: EvalRun,
    generators: ReplicaPool,
    verifier: ReplicaPool,
    prompts: list[Prompt],
    path: Path,
) -> list[Problem]:
    """Have each of `prompts` responded to, a line of the file at `path`; what is returned lacks the
    texts."""
    ended, write = 0, Jsonl(path, msgspec.json.encode)
    undecided = Undecided(_said)

    async def one(prompt: Prompt) -> Problem:
        nonlocal ended
        group = await respond(generators, verifier, prompt, asked.sampling)
        undecided.hear(group.verdicts)
        texts = await verifier.ask(Verifier.ballots, group.group, *group.verdicts)
        whole = problem(prompt, group.meta, group.verdicts, texts, asked.k)
        await aside(config.timeout.step_s, f"{path}, written", write, whole)
        ended += 1
        if 10 * ended // len(prompts) > 10 * (ended - 1) // len(prompts):
            say(f"{ended} of {len(prompts)} problems")
        return replace(whole, responses=[replace(each, text="") for each in whole.responses])

    places = config.rollout.concurrency * generators.size
    at_once = max(1, int(ALL * places / asked.sampling.samples))
    problems = await of_all(prompts, one, at_once, config.run.max_failed_share)
    failed = [each for each in problems if isinstance(each, CallFailed)]
    if failed:
        say(
            f"{len(failed)} of {len(problems)} problems have no response and are unknown; the"
            f" first: {first_line(failed[0])}"
        )
    for index, (prompt, each) in enumerate(zip(prompts, problems, strict=True)):
        if isinstance(each, CallFailed):
            whole = _unknown(prompt, first_line(each), asked)
            await aside(config.timeout.step_s, f"{path}, written", write, whole)
            problems[index] = whole
    return [each for each in problems if isinstance(each, Problem)]


def _unknown(prompt: Prompt, cause: str, asked: EvalRun) -> Problem:
    """Sum up `prompt`, to which nobody responds."""
    samples = asked.sampling.samples
    nothing = Span(version=0, start=0, end=0)
    meta = GroupMeta(
        id=prompt.id, prompt_len=0, spans=((nothing,),) * samples, truncated=(False,) * samples
    )
    verdicts = [Verdict(id=prompt.id, correct=None, cause=cause)] * samples
    return problem(prompt, meta, verdicts, [Ballot(text="", vote=None)] * samples, asked.k)


def _result(
    config: Config, asked: EvalRun, read: inputs.Problems, problems: list[Problem], wall_s: float
) -> Result:
    """Put together what `result.json` holds."""
    sampling, data = asked.sampling, config.data
    responses = [response for one in problems for response in one.responses]
    return Result(
        model=asked.student.model,
        path=asked.data.path,
        settings=Settings(
            rows=digest(read.prompts),
            problems=len(read.prompts),
            k=asked.k,
            max_new_tokens=config.rollout.max_new_tokens,
            chat_template=data.chat_template,
            template_args=data.template_args,
            check=asked.verify.check,
            stop=list(asked.rollout.stop),
            **msgspec.structs.asdict(sampling),
        ),
        thinking=data.template_args.get("enable_thinking"),
        seed=asked.run.seed,
        figures=figures(table(problems)),
        interval=INTERVAL,
        tokens=sum(response.tokens for response in responses) / len(responses),
        truncated=sum(response.truncated for response in responses) / len(responses),
        unknown=sum(response.correct is None for response in responses) / len(responses),
        wall_s=wall_s,
        environment=environment(ends=read.tokens.ends),
    )
