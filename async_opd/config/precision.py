"""Dtypes: what absent ones mean on the machines of a run, and what those of GPUs ask for."""

from collections.abc import Mapping

from msgspec.structs import replace

from async_opd.config.schema import Config
from async_opd.config.teacher_rules import Rule, longest_sequence, refuse_broken
from async_opd.core.precision import dtype_on

# GiB of attention scores of one layer that float32 may hold on a GPU: backward has three such, on
# a card of 80.
SCORES_GIB = 8.0


def with_dtypes(config: Config, *, gpus: bool) -> Config:
    """Write into `config` what its absent dtypes mean on a cluster that has `gpus`, or has none;
    not of servers, which are elsewhere."""
    reference = config.measured_against if "reference" in config.models else config.reference

    def dtype_of(section: object) -> dict:
        if getattr(section, "backend", None) == "server":
            return {}
        return {"dtype": dtype_on(gpus, getattr(section, "dtype", None))}

    return replace(
        config,
        learner=config.learner.on(gpus),
        rollout=replace(config.rollout, **dtype_of(config.rollout)),
        teacher=config.teacher and replace(config.teacher, **dtype_of(config.teacher)),
        teachers={name: replace(t, **dtype_of(t)) for name, t in config.teachers.items()},
        reference=reference and replace(reference, **dtype_of(reference)),
    )


def precision_rules(c: Config) -> list[Rule]:
    """List what dtypes and offloading need. One that is absent asks for nothing."""
    stages = "needs learner.zero_stage 1, 2 or 3"
    return [
        (
            c.learner.dtype == "bfloat16" and c.learner.zero_stage == 0,
            f"learner.dtype = 'bfloat16': {stages}, which keep float32 weights to update",
        ),
        (
            c.learner.offload_optimizer and c.learner.zero_stage == 0,
            f"learner.offload_optimizer = true: {stages}",
        ),
    ]


def refuse_on_gpus(config: Config, heads: Mapping[str, tuple[int, int]]) -> None:
    """Raise ConfigError for what GPUs ask of dtypes; `config` is `with_dtypes`. `heads`: of queries
    and of keys, by the section in `Config.models` of what runs on transformers.

    In float32 no fused kernel takes fewer heads of keys than of queries: a layer holds its scores,
    of every head, and of each token of a forward with all of its sequence."""
    refuse_broken(precision_rules(config))
    learner, rollout = config.learner, config.rollout
    alone: Rule = (
        config.sync.lora == "adapter" and rollout.dtype == "float32",
        "rollout.dtype = 'float32': must be 'bfloat16' on GPUs with sync.lora = 'adapter', for"
        " vLLM's kernels of adapters take no float32; 'merged' needs none",
    )
    refuse_broken([alone])
    for name, (queries, keys) in heads.items():
        scorer = config.scorers.get(name)
        section, setting, dtype, packed = (
            (name, "batch_tokens", scorer.dtype, scorer.batch_tokens)
            if scorer and scorer.backend != "learner"
            else ("learner", "micro_batch_tokens", learner.dtype, learner.micro_batch_tokens)
        )
        longest = longest_sequence(name, scorer, config.data, rollout)[1]
        gib = queries * max(packed, longest) * longest * 4 / 2**30
        rule: Rule = (
            dtype == "float32" and keys < queries and gib > SCORES_GIB,
            f"{section}.dtype = 'float32': must be 'bfloat16' on GPUs, where float32 has no fused"
            f" attention for {queries} heads of queries over {keys} of keys; a layer would hold"
            f" {queries} x {max(packed, longest):,} tokens ({section}.{setting}) x {longest:,} of"
            f" the longest sequence x 4 B = {gib:.1f} GiB of scores, of at most {SCORES_GIB:g}",
        )
        refuse_broken([rule])
