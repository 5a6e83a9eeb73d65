"""The plan of a run: who is where, what each holds, and what does not fit. Pure: shapes and
settings in, a plan out."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from msgspec import Struct

from async_opd.config.schema import Config
from async_opd.config.sections import SyncConfig
from async_opd.config.teacher_rules import (
    Engines,
    longest_sequence,
    shared_with_learner,
)
from async_opd.core.errors import ClusterTooSmall, ConfigError
from async_opd.roles.learner.config import LearnerConfig
from async_opd.roles.teacher.config import ScorerConfig
from async_opd.runtime.placement import RANK, ResourceRequest, place_on_alike, resource_requests
from async_opd.tools.plan import memory
from async_opd.tools.plan.adapter import Adapter, adapter
from async_opd.tools.plan.memory import CONTEXT, HEADROOM, Memory
from async_opd.tools.plan.passes import Packed, packed
from async_opd.tools.plan.shape import Shape

GIB = 2**30


class Cluster(Struct, frozen=True, kw_only=True):
    """The cluster that is planned for."""

    nodes: int | None  # None: as many as are needed
    gpus_per_node: int
    gpu_memory_gib: float


class RolePlan(Struct, frozen=True, kw_only=True):
    """One role; memory is of each of its GPUs, in GiB."""

    role: str
    members: int
    gpus: float  # of each member
    model: str
    parameters: int
    parts_gib: dict[str, float]
    total_gib: float
    limit_gib: float
    host_gib: float  # of each member's process, while most is held
    fits: bool
    kv_tokens: int | None = None  # that a vLLM engine has room for
    longest_tokens: int  # of a sequence it is given
    typical_tokens: int  # of a sequence, half of the longest unless a run has measured it


class Problem(Struct, frozen=True, kw_only=True):
    """A role that does not fit, and changes of settings each of which was tried and lets it fit."""

    what: str
    changes: list[str]


@dataclass(frozen=True, kw_only=True)
class Need:
    """Memory that a role holds on each of its GPUs, and the limit."""

    request: ResourceRequest
    section: str
    model: str
    shape: Shape
    memory: Memory
    limit: float
    longest: int
    typical: int
    kv_bytes: float = 0.0  # of one token; 0: it has no cache

    @property
    def kv_tokens(self) -> int:
        """The tokens that its cache has room for."""
        return int(self.memory.parts["kv_cache"] / self.kv_bytes)

    @property
    def fits(self) -> bool:
        """Whether it fits. An engine also needs room for one sequence of the longest: vLLM starts
        with no less."""
        room = not self.kv_bytes or self.kv_tokens >= self.longest
        return room and self.memory.total <= self.limit

    def plan(self) -> RolePlan:
        """Put it into the words of a plan."""
        return RolePlan(
            role=self.request.role,
            members=self.request.count,
            gpus=self.request.gpus,
            model=self.model,
            parameters=self.shape.parameters,
            parts_gib={
                name: round(size / GIB, 3)
                for name, size in (self.memory.parts | self.memory.either).items()
            },
            total_gib=round(self.memory.total / GIB, 3),
            limit_gib=round(self.limit / GIB, 3),
            host_gib=round(self.memory.host / GIB, 3),
            fits=self.fits,
            kv_tokens=self.kv_tokens if self.kv_bytes else None,
            longest_tokens=self.longest,
            typical_tokens=self.typical,
        )


def models(config: Config) -> dict[str, str]:
    """Name every model by the setting that names it."""
    return {f"{section}.model": model for section, model in config.models.items()}


def needs(
    config: Config, shapes: Mapping[str, Shape], card: float, response: float | None = None
) -> list[Need]:
    """Estimate what each role with a model needs of cards of `card` bytes; `shapes` by model. A
    typical `response` was measured; absent, it is half of the longest."""
    requests = {request.role: request for request in resource_requests(config, gpus=True)}
    share, student = config.run.share_gpu, shapes[config.student.model]
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    typical = _typical(config, longest, response)
    held = memory.learner(
        config.learner,
        student,
        config.sync,
        _batch(student, config.learner, config.learner.micro_batch_tokens, longest, typical),
        config.objective.needs(),
        trained_beside(config, student),
    )
    if inside := longest_in_learner(config):
        batch = _batch(
            student,
            config.learner,
            config.learner.micro_batch_tokens,
            inside,
            _typical(config, inside, response),
        )
        held.either["scoring"] = memory.scoring(config.learner, student, batch)
    learner = Need(
        request=requests[RANK],
        section="learner",
        model=config.student.model,
        shape=student,
        memory=held,
        limit=_limit(card, shared_with_learner(config.engines) if share else 1 - HEADROOM, share),
        longest=longest,
        typical=typical,
    )
    return [
        learner,
        *(
            _engine(config, pool, requests[pool.role], shapes, card, response)
            for pool in config.engines
        ),
    ]


def longest_in_learner(config: Config) -> int:
    """Find the longest sequence that the learner scores by its base; 0 where it scores none."""
    longest = (
        longest_sequence(section, scorer, config.data, config.rollout)[1]
        for section, scorer in config.in_learner.items()
    )
    return max(longest, default=0)


def trained_beside(config: Config, student: Shape) -> Adapter | None:
    """Size the student's adapter, where there is one."""
    return adapter(config.student.lora, student) if config.student.lora else None


def _typical(config: Config, longest: int, response: float | None) -> int:
    """Find a typical sequence where `longest` is the longest."""
    new = config.rollout.max_new_tokens
    prompt = (longest - new) / 2
    return max(1, min(longest, round(prompt + (new / 2 if response is None else response))))


def _batch(
    shape: Shape, each: LearnerConfig | ScorerConfig, tokens: int, longest: int, typical: int
) -> Packed:
    """Lay out `tokens` of a role on transformers, one sequence of the longest with typical ones
    beside it: in half precision cards need no padding."""
    longest = min(longest, tokens)
    beside, rest = divmod(tokens - longest, typical)
    lengths = [longest, *[typical] * beside, *([rest] if rest else [])]
    return packed(shape, lengths, padded=memory.element(each.dtype) > 2)


def _limit(card: float, share: float, shared: bool) -> float:
    """Leave to a role a share of a card, less what CUDA holds; where the card is shared, contexts
    are no part of the shares."""
    return card * share - (0 if shared else CONTEXT)


def _engine(
    config: Config,
    pool: Engines,
    request: ResourceRequest,
    shapes: Mapping[str, Shape],
    card: float,
    response: float | None,
) -> Need:
    """Estimate what a member of a pool of generators or scorers needs. An engine of vLLM has its
    share of a card, and may have the rest for what it knows nothing of."""
    role, section, _, _, each = pool
    answers, scorer = role == "teacher-generator", config.scorers.get(section)
    model = config.models[section if scorer else "student"]
    shape = shapes[model]
    _, longest = longest_sequence(section, scorer, config.data, config.rollout)
    typical = _typical(config, longest, response)
    if scorer and not answers:
        batch = _batch(shape, scorer, scorer.batch_tokens, longest, typical)
        held = memory.scorer(scorer, shape, card, batch)
    else:
        sampling = (config.teacher_sampling if answers else None) or config.rollout
        sync = SyncConfig() if answers else config.sync  # a teacher's weights do not travel
        held = memory.generator(
            each,
            shape,
            sync,
            card,
            concurrency=sampling.concurrency,
            longest=longest,
            adapter=None if answers else trained_beside(config, shape),
        )
    vllm, shared = "kv_cache" in held.parts, config.run.share_gpu
    share = each.gpu_memory_utilization if shared else 1 if vllm else 1 - HEADROOM
    return Need(
        request=request,
        section=section,
        model=model,
        shape=shape,
        memory=held,
        limit=_limit(card, share, shared),
        # vLLM samples a token behind what it scores
        longest=longest + (vllm and not answers and scorer is not None),
        typical=typical,
        kv_bytes=memory.kv_bytes(each, shape) if vllm else 0.0,
    )


def places(config: Config, gpus_per_node: int, nodes: int | None) -> dict[str, list[str]]:
    """List the members on each of `nodes`, or of as many as are needed. Raises ClusterTooSmall."""
    return place_on_alike(resource_requests(config, gpus=True), gpus_per_node, nodes)


@cache
def has_places(
    requests: tuple[ResourceRequest, ...], gpus_per_node: int, nodes: int | None
) -> bool:
    """Tell whether there is a place for each member: once for all the changes that are tried and
    ask for the same."""
    try:
        return bool(place_on_alike(requests, gpus_per_node, nodes))
    except (ConfigError, ClusterTooSmall):
        return False
