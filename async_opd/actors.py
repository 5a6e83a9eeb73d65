"""Plain role classes as Ray actors, behind the ports. The one file of the library that imports ray."""

import asyncio
import gc
import inspect
import itertools
from contextlib import ExitStack
from importlib import import_module
from typing import Any

import msgspec
import ray.util.metrics
from ray import exceptions
from ray.exceptions import ObjectLostError, OutOfMemoryError, RayActorError, RayTaskError
from tokenizers import Tokenizer

from async_opd.config import Config
from async_opd.crew import Roles
from async_opd.errors import ActorLost, AsyncOpdError, CallFailed
from async_opd.ports import Ref
from async_opd.proxies import GeneratorProxy, LearnerProxy, TeacherProxy, VerifierProxy
from async_opd.rollout.config import RolloutConfig
from async_opd.scoring import longest_sequence, refuse_without_gpus, section
from async_opd.stream.supervise import bounded
from async_opd.verify.config import VerifyConfig
from async_opd.verify.group import GroupVerifier
from async_opd.wire import Needs

GONE = (RayActorError, exceptions.WorkerCrashedError, exceptions.NodeDiedError, OutOfMemoryError)
CALLS_AT_ONCE = 10_000  # an async actor refuses nothing below this; the slots bound what there is


class _Host:
    """The actor: builds one role in its own process and forwards calls to it."""

    def __init__(self, target: str, args: tuple, settings: dict):
        module, name = target.split(":")
        self._role = getattr(import_module(module), name)(*args, **settings)
        gc.collect()
        gc.freeze()  # what was imported and built is not garbage: a full collection need not look through it

    async def call(self, method: str, *args: Any) -> Any:
        result = getattr(self._role, method)(*args)
        return await result if inspect.isawaitable(result) else result

    async def each(self, method: str, *args: Any) -> tuple[Any, ...]:
        """`call` for each of `args`, whose results stay references: the caller awaits what comes before them, the error
        of each, or None."""
        found = await asyncio.gather(*(self.call(method, arg) for arg in args), return_exceptions=True)
        errors = [result if isinstance(result, Exception) else None for result in found]
        named = [e and (e if isinstance(e, AsyncOpdError) else CallFailed(f"{method}: {e!r}")) for e in errors]
        return named, *(None if error else result for error, result in zip(named, found, strict=True))

    async def check_health(self) -> None:
        """Answered by a process that lives; a role with an engine of its own looks at it too."""
        if check := getattr(self._role, "check_health", None):
            await check()

    async def address(self) -> tuple[str, int]:
        """This node's address and a TCP port that is free on it. For roles that hold a model: it needs torch."""
        from async_opd.collective import free_port  # here, so that the driver and the verifier do without torch

        host = ray.util.get_node_ip_address()
        return host, free_port(host)


class _Actor:
    """A handle with a name and bounded calls."""

    def __init__(self, name: str, target: str, /, *args: Any, gpus: float = 0, **settings: Any):
        self.name = name
        title = name.split()[0].split(".")[0].removesuffix("s").capitalize()  # of the process, in `ps` and Ray's tools
        role = type(title, (_Host,), {})
        options = {"num_cpus": 0, "num_gpus": gpus, "max_concurrency": CALLS_AT_ONCE}
        self.handle = ray.remote(role).options(**options).remote(target, args, settings)

    async def call(self, timeout_s: float, method: str, *args: Any) -> Any:
        return await self.result(self.handle.call.remote(method, *args), timeout_s, method)

    async def spread(self, timeout_s: float, count: int, how: str, method: str, *args: Any) -> tuple[Any, list[Ref]]:
        """A call with 1 + `count` results: the first awaited, the others left where they are."""
        first, *rest = getattr(self.handle, how).options(num_returns=1 + count).remote(method, *args)
        return await self.result(first, timeout_s, method), rest

    async def check_health(self, timeout_s: float) -> None:
        await self.result(self.handle.check_health.remote(), timeout_s, "sign of life")

    def kill(self) -> None:
        ray.kill(self.handle)

    async def address(self, timeout_s: float) -> tuple[str, int]:
        """Where the actor runs; answered once its role is built."""
        return await self.result(self.handle.address.remote(), timeout_s, "start")

    async def result(self, ref: Ref, timeout_s: float, what: str) -> Any:
        """Await a call's result. Raises the role's own named error, ActorLost, or TimedOut."""
        try:
            return await bounded(_as_future(ref), timeout_s, f"{self.name}, {what}")
        except GONE as e:
            lines = str(e).partition("Some common causes")[0].strip().splitlines()
            why = " … ".join(dict.fromkeys((lines[0], lines[-1])))  # a failed constructor ends with its own error
            raise ActorLost(f"{self.name} died during {what}: {why}") from None
        except RayTaskError as e:
            if isinstance(e.cause, AsyncOpdError):
                raise e.cause from None
            raise CallFailed(f"{self.name}, {what}: {type(e.cause).__name__}: {e.cause}") from e
        except ObjectLostError as e:  # what it was to work on went with a node
            raise CallFailed(f"{self.name}, {what}: {e}") from None


async def _as_future(ref: Ref) -> Any:
    return await ref


def start_ray() -> None:
    """Connect to the cluster at RAY_ADDRESS, or start a local one, unless that is done. From the main thread only."""
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")


class Cluster:
    """Every actor of one run, started side by side on the cluster at RAY_ADDRESS, or on a local one made for this run.

    A context manager: on leaving, however that comes about, its actors are killed and a local cluster is stopped.
    """

    def __init__(self, config: Config, *, eos_ids: list[int], tokenizer: Tokenizer, first_seed: int | None = None):
        """`first_seed`: of the engines, the config's where it is absent."""
        self._config, self._eos_ids = config, eos_ids
        self._tokenizer, self._vocabulary = tokenizer.to_str(), tokenizer.get_vocab_size()
        self._actors: list[_Actor] = []
        # Of every engine ever started: none repeats another's draws.
        self._seeds = itertools.count(config.run.seed if first_seed is None else first_seed)
        self._remote_code = {"trust_remote_code": config.run.trust_remote_code}

    def __enter__(self) -> "Cluster":
        start_ray()
        self._gpus = 1 if ray.cluster_resources().get("GPU") else 0
        return self

    def __exit__(self, *_: object) -> None:
        try:
            for actor in self._actors:
                actor.kill()
        finally:
            ray.shutdown()

    async def roles(self) -> Roles:
        """Start the roles of a training run; at most `timeout.start_s`."""
        config, start_s = self._config, self._config.timeout.start_s
        if not self._gpus:
            refuse_without_gpus(config.scorers, config.rollout, config.objective)
        sampling = config.teacher_sampling
        sizes = {"generator": config.rollout.generators, "teacher-generator": sampling.generators if sampling else 0}
        sizes |= {"verifier": 1} | {at: scorer.replicas for at, scorer in config.scorers.items()}
        starting = {name: [self._make(name, at) for at in range(size)] for name, size in sizes.items()}
        ranks = [self._learner_rank(rank) for rank in range(config.learner.ranks)]
        address, port = await ranks[0].address(start_s)
        found, _ = await asyncio.gather(
            asyncio.gather(*(asyncio.gather(*map(self._ready, pool)) for pool in starting.values())),
            asyncio.gather(*(rank.call(start_s, "start", f"tcp://{address}:{port}") for rank in ranks)),
        )
        pools = dict(zip(starting, found, strict=True))
        return Roles(
            generators=pools["generator"],
            teacher_generators=pools["teacher-generator"],
            teachers={name: pools[section(name)] for name in config.named_teachers},
            references=pools.get("reference", ()),
            verifier=pools["verifier"][0],
            learner=LearnerProxy(ranks, address, config),
            spawn=self._spawn,
        )

    async def evaluators(self) -> tuple[list[GeneratorProxy], list[VerifierProxy]]:
        """Start only what an evaluation needs."""
        names = [("generator", at) for at in range(self._config.rollout.generators)] + [("verifier", 0)]
        *generators, verifier = await asyncio.gather(*(self._spawn(*name) for name in names))
        return generators, [verifier]

    async def _spawn(self, name: str, index: int) -> GeneratorProxy | TeacherProxy | VerifierProxy:
        """A new member of the pool `name`, ready; at most `timeout.start_s`."""
        actor = self._make(name, index)
        with ExitStack() as unless:
            unless.callback(actor.kill)
            port = await self._ready(actor)
            unless.pop_all()
        return port

    async def _ready(self, actor: _Actor) -> GeneratorProxy | TeacherProxy | VerifierProxy:
        """The port of a member of a pool, once it can be used."""
        start_s, kind = self._config.timeout.start_s, actor.name.split()[0]
        if kind in ("generator", "teacher-generator", "verifier"):
            await actor.call(start_s, "start")
            return (VerifierProxy if kind == "verifier" else GeneratorProxy)(actor, self._config)
        await actor.address(start_s)
        return TeacherProxy(actor, self._config, self._eos_ids)

    def _make(self, name: str, index: int) -> _Actor:
        """The actor for a seat of the pool `name`, on its way."""
        config, member = self._config, f"{name} {index}"
        if name == "generator":
            return self._generator(member, config.rollout, config.objective.needs(), config.student.model)
        if name == "teacher-generator":
            return self._teacher_generator(member)
        if name == "verifier":
            within_s = config.timeout.score_s
            return self._actor(member, "async_opd.actors:make_verifier", config.verify, self._tokenizer, within_s)
        return self._scorer(member, name)

    def _actor(self, name: str, target: str, /, *args: Any, gpus: float = 0, **settings: Any) -> _Actor:
        self._actors.append(_Actor(name, target, *args, gpus=gpus, **settings))
        return self._actors[-1]

    def _teacher_generator(self, name: str) -> _Actor:
        """An engine that holds the teacher and samples as the student's do, once a prompt."""
        config, teacher, sampling = self._config, self._config.teacher, self._config.teacher_sampling
        rollout = msgspec.structs.replace(
            config.rollout,
            samples_per_prompt=1,
            max_new_tokens=sampling.max_new_tokens or config.rollout.max_new_tokens,
            concurrency=sampling.concurrency,
            dtype=teacher.dtype,
            tensor_parallel_size=teacher.tensor_parallel_size,
            memory_gib=teacher.memory_gib,
            gpu_memory_utilization=teacher.gpu_memory_utilization,
        )
        return self._generator(name, rollout, Needs(), teacher.model, teacher.max_prompt_tokens)

    def _generator(
        self, name: str, rollout: RolloutConfig, needs: Needs, model: str, longest_prompt: int | None = None
    ) -> _Actor:
        return self._actor(
            name,
            "async_opd.rollout.generator:RolloutGenerator",
            rollout,
            needs,
            name=name,
            model=model,
            eos_ids=self._eos_ids,
            max_prompt_tokens=longest_prompt or self._config.data.max_prompt_tokens,
            vocabulary=self._vocabulary,
            backend=self._config.sync.backend,
            seed=next(self._seeds),
            gpus=self._gpus * rollout.tensor_parallel_size,
            **self._remote_code,
        )

    def _scorer(self, name: str, at: str) -> _Actor:
        """A replica of the teacher, or of the reference, in section `at`."""
        config, scorer, reference = self._config, self._config.scorers[at], at == "reference"
        vllm = scorer.backend == "vllm"
        _, longest = longest_sequence(at, scorer, config.data, config.rollout)
        own = {"role": name, "longest": longest} if vllm else {"temperature": config.rollout.temperature}
        return self._actor(
            name,
            "async_opd.teacher.vllm:VllmTeacher" if vllm else "async_opd.teacher.scorer:TransformersTeacher",
            scorer,
            Needs() if reference else config.objective.needs(),
            vocabulary=self._vocabulary,
            as_student=reference,
            gpus=self._gpus * scorer.tensor_parallel_size,
            **own,
            **self._remote_code,
        )

    def _learner_rank(self, rank: int) -> _Actor:
        run, sampling = self._config.run, self._config.teacher_sampling
        return self._actor(
            f"learner rank {rank}",
            "async_opd.learner.engine:LearnerRank",
            self._config.learner,
            self._config.objective,
            model=self._config.student.model,
            temperature=self._config.rollout.temperature,
            steps=run.steps,
            max_lag_steps=run.max_lag_steps,
            stale=run.stale,
            truncated=self._config.rollout.truncated,
            cap=self._config.rollout.max_new_tokens,
            seed=run.seed,
            rank=rank,
            timeout_s=self._config.timeout.step_s,
            bucket_bytes=self._config.sync.bucket_mib << 20,
            taught_weight=sampling and sampling.weight,
            gpus=self._gpus,
            **self._remote_code,
        )


def make_verifier(config: VerifyConfig, tokenizer: str, within_s: float) -> GroupVerifier:
    """Runs in the verifier's actor: the pool, and the student's tokenizer (as JSON) to decode by, without torch."""
    decoder = Tokenizer.from_str(tokenizer)
    return GroupVerifier(config, lambda ids: decoder.decode(ids.tolist(), skip_special_tokens=True), within_s)


def gauge(name: str, meaning: str, run: str) -> ray.util.metrics.Gauge:
    """To `set` what the agent of this node exports to Prometheus as `ray_<name>` with the label `run`."""
    made = ray.util.metrics.Gauge(name, description=meaning, tag_keys=("run",))
    made.set_default_tags({"run": run})
    return made
