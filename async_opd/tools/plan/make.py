"""The plan of a run: who is where, what each holds, and what does not fit. Pure: shapes and
settings in, a plan out."""

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from msgspec import Struct
from msgspec.structs import replace

from async_opd.config.schema import Config
from async_opd.config.sections import SyncConfig
from async_opd.config.teacher_rules import (
    Engines,
    longest_prompt,
    longest_sequence,
    shared_with_learner,
)
from async_opd.core.errors import ClusterTooSmall, ConfigError
from async_opd.roles.learner.config import LearnerConfig
from async_opd.roles.teacher.config import ScorerConfig
from async_opd.runtime.placement import RANK, ResourceRequest, place_on_alike, resource_requests
from async_opd.tools.plan import memory
from async_opd.tools.plan.memory import CONTEXT, HEADROOM, Memory
from async_opd.tools.plan.passes import Packed, packed
from async_opd.tools.plan.shape import Shape

GIB = 2**30
UNBOUNDED = 2**20  # tokens of a response, where no model names a context


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
    learner = Need(
        request=requests[RANK],
        section="learner",
        model=config.student.model,
        shape=student,
        memory=memory.learner(
            config.learner,
            student,
            config.sync,
            _batch(student, config.learner, config.learner.micro_batch_tokens, longest, typical),
            config.objective.needs(),
        ),
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
            each, shape, sync, card, concurrency=sampling.concurrency, longest=longest
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
    """List the members on each of `nodes`; absent, of as many as are needed. Raises
    ClusterTooSmall."""
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


def longest_response(
    config: Config, shapes: Mapping[str, Shape], card: float
) -> tuple[int, list[str]]:
    """Find the longest response that memory and contexts have room for, all other settings as they
    are (batches grow to one sequence where they must), and what bounds it. 0 where none fits."""
    contexts = {
        f"the context of {key}": _room(config, key, context)
        for key, model in models(config).items()
        if model in shapes and (context := shapes[model].context)
    }
    bound = min(contexts.values(), default=UNBOUNDED)

    def full(response: int) -> list[str]:
        return [
            f"the memory of a {need.request.role}"
            for need in needs(_stretched(config, response), shapes, card)
            if not need.fits
        ]

    over = bisect_left(range(bound + 1), True, lo=1, key=lambda response: bool(full(response)))
    return over - 1, full(over) if over <= bound else [
        key for key, room in contexts.items() if room == bound
    ]


def _room(config: Config, key: str, context: int) -> int:
    """Count the tokens of a response that the `context` of the model in setting `key` leaves."""
    section = key.removesuffix(".model")
    scorer = config.scorers.get(section)
    _, prompt = longest_prompt(section, scorer, config.data)
    return context - prompt - (scorer is not None and scorer.backend in ("vllm", "server"))


def _stretched(config: Config, response: int) -> Config:
    """Change `config` for responses of at most `response` tokens: each batch that must hold a
    sequence does."""
    rollout = replace(config.rollout, max_new_tokens=response)

    def scorer(section: str, each: ScorerConfig | None) -> ScorerConfig | None:
        if each is None or each.backend != "transformers":
            return each
        _, longest = longest_sequence(section, each, config.data, rollout)
        return replace(each, batch_tokens=max(each.batch_tokens, longest))

    tokens = max(config.learner.micro_batch_tokens, config.data.max_prompt_tokens + response)
    return replace(
        config,
        rollout=rollout,
        learner=replace(config.learner, micro_batch_tokens=tokens),
        teacher=scorer("teacher", config.teacher),
        teachers={name: scorer(f"teachers.{name}", each) for name, each in config.teachers.items()},
        reference=scorer("reference", config.scorers.get("reference")),
    )
