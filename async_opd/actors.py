"""Plain role classes as Ray actors, behind the ports. The one file of the library that imports ray."""

import asyncio
import inspect
from importlib import import_module
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayActorError, RayTaskError
from tokenizers import Tokenizer

from async_opd.collective import free_port
from async_opd.config import Config
from async_opd.errors import ActorLost, AsyncOpdError
from async_opd.maths.packing import plan
from async_opd.ports import Ready, Ref
from async_opd.stream.supervise import bounded
from async_opd.train import Roles
from async_opd.verify.config import VerifyConfig
from async_opd.verify.group import GroupVerifier
from async_opd.wire import GroupMeta, Prompt, Rollout, StepResult, Verdict

CALLS_AT_ONCE = 10_000  # an async actor refuses nothing below this; the slots bound what there is


class _Host:
    """The actor: builds one role in its own process and forwards calls to it."""

    def __init__(self, target: str, args: tuple, settings: dict):
        module, name = target.split(":")
        self._role = getattr(import_module(module), name)(*args, **settings)

    async def call(self, method: str, *args: Any) -> Any:
        result = getattr(self._role, method)(*args)
        return await result if inspect.isawaitable(result) else result

    async def keep(self, method: str, *args: Any) -> tuple[None, Any]:
        """As `call`, for a result that stays a reference: the caller awaits the None beside it."""
        return None, await self.call(method, *args)

    async def address(self) -> tuple[str, int]:
        """This node's address and a TCP port that is free on it."""
        host = ray.util.get_node_ip_address()
        return host, free_port(host)


class _Actor:
    """A handle with a name and bounded calls."""

    def __init__(self, name: str, target: str, *args: Any, gpus: float = 0, **settings: Any):
        self.name = name
        self.handle = ray.remote(_Host).options(
            num_cpus=0, num_gpus=gpus, max_concurrency=CALLS_AT_ONCE
        ).remote(target, args, settings)  # fmt: skip

    async def call(self, timeout_s: float, method: str, *args: Any) -> Any:
        return await self.result(self.handle.call.remote(method, *args), timeout_s, method)

    async def pair(self, timeout_s: float, how: str, method: str, *args: Any) -> tuple[Any, Ref]:
        """A call with two results: the first awaited, the second left where it is."""
        first, second = getattr(self.handle, how).options(num_returns=2).remote(method, *args)
        return await self.result(first, timeout_s, method), second

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


class RayGenerator:
    """`ports.Generator` over an actor."""

    def __init__(self, actor: _Actor, config: Config):
        self._actor, self._sync_s, self._generate_s = actor, config.sync.timeout_s, config.timeout.generate_s
        self._sent = 0  # requests since the last update: what `resume` waits for

    async def generate(self, prompt: Prompt) -> tuple[GroupMeta, Ref]:
        self._sent += 1
        return await self._actor.pair(self._generate_s, "call", "generate", prompt)

    async def greedy(self, prompt: Prompt) -> tuple[GroupMeta, Ref]:
        self._sent += 1
        return await self._actor.pair(self._generate_s, "call", "greedy", prompt)

    async def probe(self) -> tuple[np.ndarray, Rollout]:
        self._sent += 1
        return await self._actor.call(self._generate_s, "probe")

    async def join_group(self, init_info: dict) -> None:
        await self._actor.call(2 * self._sync_s, "join_group", init_info)

    async def update(self, version: int, update_info: dict) -> None:
        try:
            await self._actor.call(2 * self._sync_s, "update", version, update_info)
        finally:
            self._sent = 0

    async def resume(self) -> None:
        await self._actor.call(self._sync_s, "resume", self._sent)

    async def check_health(self) -> None:
        await self._actor.call(self._generate_s, "check_health")


class RayTeacher:
    """`ports.Teacher` over an actor."""

    def __init__(self, actor: _Actor, config: Config, eos_ids: list[int]):
        self.actor, self._config, self._score_s = actor, config, config.timeout.score_s
        self._eos_ids = eos_ids

    async def greedy(self, prompts: list[np.ndarray]) -> list[np.ndarray]:
        settings = self._config.rollout.max_new_tokens, self._eos_ids
        return await self.actor.call(self._config.timeout.generate_s, "greedy", prompts, *settings)

    async def score(self, group: Ref) -> Ref:
        _, scores = await self.actor.pair(self._score_s, "keep", "score", group)
        return scores


class RayVerifier:
    """`ports.Verifier` over an actor that owns the pool's processes."""

    def __init__(self, actor: _Actor, config: Config):
        self.actor, self._score_s = actor, config.timeout.score_s

    async def check(self, group: Ref) -> tuple[Verdict, ...]:
        return await self.actor.call(self._score_s, "check", group)

    async def check_response(self, id: str, ids: np.ndarray, answer: str) -> Verdict:
        return await self.actor.call(self._score_s, "check_response", id, ids, answer)


class RayLearner:
    """`ports.Learner` over one actor a rank."""

    def __init__(self, ranks: list[_Actor], address: str, config: Config):
        self.ranks, self._address, self._config = ranks, address, config
        self._step_s, self._sync_s = config.timeout.step_s, config.sync.timeout_s

    async def step(self, groups: list[Ready]) -> StepResult:
        index = [(g, s) for g, ready in enumerate(groups) for s in ready.samples]
        lengths = [groups[g].meta.prompt_len + groups[g].meta.lengths[s] for g, s in index]
        shares = plan(lengths, ranks=len(self.ranks), tokens=self._config.learner.micro_batch_tokens)
        results = await asyncio.gather(
            *(self._rank_step(rank, share, index, groups) for rank, share in zip(self.ranks, shares, strict=True))
        )
        return results[0]

    async def _rank_step(self, rank: _Actor, share: list[list[int]], index: list, groups: list[Ready]) -> StepResult:
        used = sorted({index[i][0] for micro in share for i in micro})
        here = {g: at for at, g in enumerate(used)}
        micros = [[(here[index[i][0]], index[i][1]) for i in micro] for micro in share]
        verdicts = [groups[g].verdicts for g in used]
        data = [groups[g].group for g in used] + [groups[g].scores for g in used]
        return await rank.call(self._step_s, "step", micros, verdicts, *data)

    async def open_group(self, generators: int) -> list[dict]:
        size = self._config.rollout.tensor_parallel_size
        offsets = [1 + at * size for at in range(generators)]
        backend, bucket = self._config.sync.backend, self._config.sync.bucket_mib << 20
        args = backend, self._address, offsets, 1 + generators * size, bucket, self._sync_s
        return await self.ranks[0].call(self._sync_s, "open_group", *args)

    async def join_group(self, generators: int) -> None:
        world = 1 + generators * self._config.rollout.tensor_parallel_size
        await self.ranks[0].call(2 * self._sync_s, "join_group", world)

    async def update_info(self) -> dict:
        return await self.ranks[0].call(self._sync_s, "update_info")

    async def send_weights(self) -> None:
        await self.ranks[0].call(2 * self._sync_s, "send_weights")

    async def logprobs(self, prompt_ids: np.ndarray, response_ids: np.ndarray) -> np.ndarray:
        return await self.ranks[0].call(self._step_s, "logprobs", prompt_ids, response_ids)

    async def save(self, folder: str) -> None:
        await asyncio.gather(*(rank.call(self._step_s, "save", folder) for rank in self.ranks))


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
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        self._gpus = 1 if ray.cluster_resources().get("GPU") else 0
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self._actors:
            ray.kill(actor.handle)
        ray.shutdown()

    async def roles(self) -> Roles:
        """Start the roles of a training run; at most `timeout.start_s`."""
        config, start_s = self._config, self._config.timeout.start_s
        generators, verifier = self._generators(), self._verifier()
        teachers = [self._teacher(at) for at in range(config.teacher.replicas)]
        ranks = [self._learner_rank(rank) for rank in range(config.learner.ranks)]
        address, port = await ranks[0].address(start_s)
        await asyncio.gather(
            verifier.call(start_s, "start"),
            *(rank.call(start_s, "start", f"tcp://{address}:{port}") for rank in ranks),
            *(actor.address(start_s) for actor in generators + teachers),
        )
        return Roles(
            generators=[RayGenerator(actor, config) for actor in generators],
            teachers=[RayTeacher(actor, config, self._eos_ids) for actor in teachers],
            verifier=RayVerifier(verifier, config),
            learner=RayLearner(ranks, address, config),
        )

    async def evaluators(self) -> tuple[list[RayGenerator], RayVerifier]:
        """Start only what an evaluation needs."""
        generators, verifier = self._generators(), self._verifier()
        start_s = self._config.timeout.start_s
        await asyncio.gather(verifier.call(start_s, "start"), *(actor.address(start_s) for actor in generators))
        return [RayGenerator(actor, self._config) for actor in generators], RayVerifier(verifier, self._config)

    def _actor(self, name: str, target: str, *args: Any, gpus: float = 0, **settings: Any) -> _Actor:
        self._actors.append(_Actor(name, target, *args, gpus=gpus, **settings))
        return self._actors[-1]

    def _generators(self) -> list[_Actor]:
        config = self._config
        return [
            self._actor(
                f"generator {at}",
                "async_opd.rollout.generator:RolloutGenerator",
                config.rollout,
                index=at,
                model=config.student.model,
                eos_ids=self._eos_ids,
                max_prompt_tokens=config.data.max_prompt_tokens,
                vocabulary=self._vocabulary,
                backend=config.sync.backend,
                seed=config.run.seed,
                gpus=self._gpus * config.rollout.tensor_parallel_size,
                **self._remote_code,
            )
            for at in range(config.rollout.generators)
        ]

    def _verifier(self) -> _Actor:
        return self._actor("verifier", "async_opd.actors:make_verifier", self._config.verify, self._tokenizer)

    def _teacher(self, at: int) -> _Actor:
        return self._actor(
            f"teacher {at}",
            "async_opd.teacher.scorer:TransformersTeacher",
            self._config.teacher,
            self._config.objective.needs(),
            temperature=self._config.rollout.temperature,
            vocabulary=self._vocabulary,
            gpus=self._gpus,
            **self._remote_code,
        )

    def _learner_rank(self, rank: int) -> _Actor:
        run = self._config.run
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
            seed=run.seed,
            rank=rank,
            timeout_s=self._config.timeout.step_s,
            gpus=self._gpus,
            **self._remote_code,
        )


def make_verifier(config: VerifyConfig, tokenizer: str) -> GroupVerifier:
    """Runs in the verifier's actor: the pool, and the student's tokenizer (as JSON) to decode by, without torch."""
    decoder = Tokenizer.from_str(tokenizer)
    return GroupVerifier(config, lambda ids: decoder.decode(ids.tolist(), skip_special_tokens=True))
