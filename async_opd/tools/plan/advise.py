"""Changes of settings that let a role fit, each tried before it is named."""

from collections.abc import Callable, Iterator

from async_opd.config.schema import Config
from async_opd.tools.plan.make import GIB, Need, Problem

# roles that do not fit with more overrides; None: they are refused
Retry = Callable[[list[str]], set[str] | None]
Ladder = list[list[str]]  # from its lowest rung to its highest; a rung is overrides
SHARES = [n / 20 for n in range(1, 20)]  # of a card
ZERO_STAGE = "learner.zero_stage"
NO_CHANGE = "; no change that was tried is enough: take a smaller model, or larger GPUs"


def problems(
    config: Config, needs: list[Need], retry: Retry, gpus_per_node: int
) -> Iterator[Problem]:
    """Say what of `needs` does not fit, and what helps."""
    large = [need for need in needs if not need.fits]
    for need in large:
        others = {other.request.role for other in large if other is not need}

        def fits(overrides: list[str], others: set[str] = others) -> bool:
            left = retry(overrides)
            return left is not None and left <= others

        ladders = (
            _learner_ladders(config, need)
            if need.section == "learner"
            else _engine_ladders(config, need, gpus_per_node)
        )
        changes = _changes(list(ladders), fits, retry)
        yield Problem(what=_what(need) + ("" if changes else NO_CHANGE), changes=changes)


def _what(need: Need) -> str:
    held = f"{need.memory.total / GIB:.1f} GiB of {need.limit / GIB:.1f}"
    if need.kv_bytes and need.kv_tokens < need.longest:
        held += f", with room for {need.kv_tokens} tokens, one sequence may have {need.longest}"
    return f"{need.request.role}, {need.model}: {held}"


def _changes(ladders: list[Ladder], fits: Callable[[list[str]], bool], retry: Retry) -> list[str]:
    """Choose the lowest rung of each ladder that is enough alone; where none is, the highest rungs
    of as few as are."""
    alone = [next((rung for rung in ladder if fits(rung)), None) for ladder in ladders]
    if any(alone):
        return [" ".join(rung) for rung in alone if rung]
    rungs: list[list[str]] = []
    for ladder in ladders:
        rungs += next(
            ([rung] for rung in reversed(ladder) if retry(_merged([*rungs, rung])) is not None), []
        )
        if fits(_merged(rungs)):
            for rung in rungs[:-1]:
                fewer = [other for other in rungs if other is not rung]
                rungs = fewer if fits(_merged(fewer)) else rungs
            return [" ".join(_merged(rungs))]
    return []


def _merged(rungs: list[list[str]]) -> list[str]:
    """Join the overrides of all, of each setting the last."""
    return list(
        {override.partition("=")[0]: override for rung in rungs for override in rung}.values()
    )


def _engine_ladders(config: Config, need: Need, gpus_per_node: int) -> Iterator[Ladder]:
    """Yield ways out of what a generator or scorer needs."""
    section = need.section
    scorer = config.scorers.get(section)
    each = scorer or config.rollout
    if each.dtype == "float32":
        yield [[f"{section}.dtype=bfloat16"]]
    sizes = [2**n for n in range(10) if 2**n <= gpus_per_node and need.shape.heads % 2**n == 0]
    if need.kv_bytes or scorer is None:
        yield [
            [f"{section}.tensor_parallel_size={n}"] for n in sizes if n > each.tensor_parallel_size
        ]
        yield [
            [f"{section}.gpu_memory_utilization={share}"]
            for share in SHARES
            if share > each.gpu_memory_utilization
        ]
        # beside the share there is room for what vLLM knows nothing of
        yield [
            [f"{section}.gpu_memory_utilization={share}"]
            for share in reversed(SHARES)
            if share < each.gpu_memory_utilization
        ]
        shorter = config.rollout.max_new_tokens - max(need.longest - need.kv_tokens, 0)
        yield [[f"rollout.max_new_tokens={shorter}"]] if shorter > 0 else []
    else:
        yield (
            [[f"{section}.batch_tokens={need.longest}"]]
            if scorer.batch_tokens > need.longest
            else []
        )
        yield [[f"{section}.backend=vllm", f"{section}.tensor_parallel_size={n}"] for n in sizes]


def _learner_ladders(config: Config, need: Need) -> Iterator[Ladder]:
    """Yield ways out of what the learner needs."""
    now = config.learner
    stage = now.zero_stage or 0
    if not now.gradient_checkpointing:
        yield [["learner.gradient_checkpointing=true"]]
    if now.micro_batch_tokens > need.longest:
        yield [[f"learner.micro_batch_tokens={need.longest}"]]
    if now.dtype == "float32":
        yield [["learner.dtype=bfloat16", f"{ZERO_STAGE}={max(stage, 2)}"]]
    if not now.offload_optimizer:
        sharded = [f"{ZERO_STAGE}=2"] if stage == 0 else []
        yield [["learner.offload_optimizer=true", *sharded]]
    yield [[f"{ZERO_STAGE}={more}"] for more in (2, 3) if more > stage]
    if not config.run.share_gpu:
        more = [now.ranks * 2**n for n in range(1, 7)]
        yield [[f"learner.ranks={ranks}"] for ranks in more if ranks <= now.trajectories_per_step]
    else:
        yield [
            [f"rollout.gpu_memory_utilization={share}"]
            for share in reversed(SHARES)
            if share < config.rollout.gpu_memory_utilization
        ]
