"""Plain role classes as Ray actors, behind the ports. The one file of the library that imports ray."""

import asyncio
import gc
import inspect
import itertools
from importlib import import_module
from typing import Any

import msgspec
import ray
from ray.exceptions import RayActorError, RayTaskError
from tokenizers import Tokenizer

from async_opd.config import Config
from async_opd.errors import ActorLost, AsyncOpdError
from async_opd.ports import Ref
from async_opd.proxies import GeneratorProxy, LearnerProxy, TeacherProxy, VerifierProxy
from async_opd.rollout.config import RolloutConfig
from async_opd.scoring import longest_sequence, refuse_without_gpus, section
from async_opd.stream.supervise import bounded
from async_opd.train import Roles
from async_opd.verify.config import VerifyConfig
from async_opd.verify.group import GroupVerifier
from async_opd.wire import Needs

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
        """`call` for each of `args`, whose results stay references: the caller awaits the None before them."""
        return None, *await asyncio.gather(*(self.call(method, arg) for arg in args))

    async def address(self) -> tuple[str, int]:
        """This node's address and a TCP port that is free on it. For roles that hold a model: it needs torch."""
        from async_opd.collective import free_port  # here, so that the driver and the verifier do without torch

        host = ray.util.get_node_ip_address()
        return host, free_port(host)


class _Actor:
    """A handle with a name and bounded calls."""

    def __init__(self, name: str, target: str, /, *args: Any, gpus: float = 0, **settings: Any):
        self.name = name
        role = type(name.split()[0].capitalize(), (_Host,), {})  # what `ps` and Ray's tools call the process
        options = {"num_cpus": 0, "num_gpus": gpus, "max_concurrency": CALLS_AT_ONCE}
        self.handle = ray.remote(role).options(**options).remote(target, args, settings)

    async def call(self, timeout_s: float, method: str, *args: Any) -> Any:
        return await self.result(self.handle.call.remote(method, *args), timeout_s, method)

    async def spread(self, timeout_s: float, count: int, how: str, method: str, *args: Any) -> tuple[Any, list[Ref]]:
        """A call with 1 + `count` results: the first awaited, the others left where they are."""
        first, *rest = getattr(self.handle, how).options(num_returns=1 + count).remote(method, *args)
        return await self.result(first, timeout_s, method), rest

    async def address(self, timeout_s: float) -> tuple[str, int]:
        """Where the actor runs; answered once its role is built."""
        return await self.result(self.handle.address.remote(), timeout_s, "start")

    async def result(self, ref: Ref, timeout_s: float, what: str) -> Any:
        """Await a call's result. Raises the role's own named error, ActorLost, or TimedOut."""
        try:
            return await bounded(_as_future(ref), timeout_s, f"{self.name}, {what}")
        except RayActorError as e:
            lines = str(e).strip().splitlines()  # a failed constructor ends with its own error
            raise ActorLost(f"{self.name} died during {what}: {lines[0]} … {lines[-1]}") from None
        except RayTaskError as e:
            if isinstance(e.cause, AsyncOpdError):
                raise e.cause from None
            raise


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

    def __init__(self, config: Config, *, eos_ids: list[int], tokenizer: Tokenizer):
        self._config, self._eos_ids = config, eos_ids
        self._tokenizer, self._vocabulary = tokenizer.to_str(), tokenizer.get_vocab_size()
        self._actors: list[_Actor] = []
        self._remote_code = {"trust_remote_code": config.run.trust_remote_code}

    def __enter__(self) -> "Cluster":
        start_ray()
        self._gpus = 1 if ray.cluster_resources().get("GPU") else 0
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self._actors:
            ray.kill(actor.handle)
        ray.shutdown()

    async def roles(self) -> Roles:
        """Start the roles of a training run; at most `timeout.start_s`."""
        config, start_s = self._config, self._config.timeout.start_s
        if not self._gpus:
            refuse_without_gpus(config.scorers, config.rollout, config.objective)
        generators, verifier = self._generators(), self._verifier()
        scorers = {at: self._scorer(at) for at in config.scorers}
        teacher_generators = self._teacher_generators()
        ranks = [self._learner_rank(rank) for rank in range(config.learner.ranks)]
        address, port = await ranks[0].address(start_s)
        await asyncio.gather(
            verifier.call(start_s, "start"),
            *(rank.call(start_s, "start", f"tcp://{address}:{port}") for rank in ranks),
            *(generator.call(start_s, "start") for generator in generators + teacher_generators),
            *(actor.address(start_s) for actor in itertools.chain(*scorers.values())),
        )
        pools = {at: [TeacherProxy(actor, config, self._eos_ids) for actor in pool] for at, pool in scorers.items()}
        return Roles(
            generators=[GeneratorProxy(actor, config) for actor in generators],
            teacher_generators=[GeneratorProxy(actor, config) for actor in teacher_generators],
            teachers={name: pools[section(name)] for name in config.named_teachers},
            references=pools.get("reference", ()),
            verifier=VerifierProxy(verifier, config),
            learner=LearnerProxy(ranks, address, config),
        )

    async def evaluators(self) -> tuple[list[GeneratorProxy], VerifierProxy]:
        """Start only what an evaluation needs."""
        generators, verifier = self._generators(), self._verifier()
        start_s = self._config.timeout.start_s
        await asyncio.gather(verifier.call(start_s, "start"), *(actor.address(start_s) for actor in generators))
        return [GeneratorProxy(actor, self._config) for actor in generators], VerifierProxy(verifier, self._config)

    def _actor(self, name: str, target: str, /, *args: Any, gpus: float = 0, **settings: Any) -> _Actor:
        self._actors.append(_Actor(name, target, *args, gpus=gpus, **settings))
        return self._actors[-1]

    def _generators(self) -> list[_Actor]:
        config, needs = self._config, self._config.objective.needs()
        return [
            self._generator(f"generator {at}", config.rollout, needs, config.student.model, config.run.seed + at)
            for at in range(config.rollout.generators)
        ]

    def _teacher_generators(self) -> list[_Actor]:
        """Engines that hold the teacher and sample as the student's do, once a prompt; none without
        [teacher_sampling]. Seeds go on behind those of the student's."""
        config, teacher, sampling = self._config, self._config.teacher, self._config.teacher_sampling
        if sampling is None:
            return []
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
        seed = config.run.seed + config.rollout.generators
        return [
            self._generator(
                f"teacher-generator {at}", rollout, Needs(), teacher.model, seed + at, teacher.max_prompt_tokens
            )
            for at in range(sampling.generators)
        ]

    def _generator(
        self, name: str, rollout: RolloutConfig, needs: Needs, model: str, seed: int, longest_prompt: int | None = None
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
            seed=seed,
            gpus=self._gpus * rollout.tensor_parallel_size,
            **self._remote_code,
        )

    def _verifier(self) -> _Actor:
        score_s = self._config.timeout.score_s
        return self._actor("verifier", "async_opd.actors:make_verifier", self._config.verify, self._tokenizer, score_s)

    def _scorer(self, at: str) -> list[_Actor]:
        """The replicas of the teacher, or of the reference, in section `at`."""
        config, scorer, reference = self._config, self._config.scorers[at], at == "reference"
        vllm = scorer.backend == "vllm"
        _, longest = longest_sequence(at, scorer, config.data, config.rollout)
        found = []
        for replica in range(scorer.replicas):
            name = f"{at.replace('teachers.', 'teacher ')} {replica}"
            own = {"role": name, "longest": longest} if vllm else {"temperature": config.rollout.temperature}
            actor = self._actor(
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
            found.append(actor)
        return found

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
