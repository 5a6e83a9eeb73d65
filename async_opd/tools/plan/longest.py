"""The longest response that a planned run has room for."""

from bisect import bisect_left
from collections.abc import Mapping

from msgspec.structs import replace

from async_opd.config.schema import Config
from async_opd.config.teacher_rules import longest_prompt, longest_sequence
from async_opd.roles.teacher.config import ScorerConfig
from async_opd.tools.plan import make
from async_opd.tools.plan.shape import Shape

UNBOUNDED = 2**20  # tokens of a response, where no model names a context


def longest_response(
    config: Config, shapes: Mapping[str, Shape], card: float
) -> tuple[int, list[str]]:
    """Find the longest response that memory and contexts have room for, all other settings as they
    are (batches grow to one sequence where they must), and what bounds it. 0 where none fits."""
    contexts = {
        f"the context of {key}": _room(config, key, context)
        for key, model in make.models(config).items()
        if model in shapes and (context := shapes[model].context)
    }
    bound = min(contexts.values(), default=UNBOUNDED)

    def full(response: int) -> list[str]:
        return [
            f"the memory of a {need.request.role}"
            for need in make.needs(_stretched(config, response), shapes, card)
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

    tokens = max(
        config.learner.micro_batch_tokens,
        config.data.max_prompt_tokens + response,
        make.longest_in_learner(replace(config, rollout=rollout)),
    )
    return replace(
        config,
        rollout=rollout,
        learner=replace(config.learner, micro_batch_tokens=tokens),
        teacher=scorer("teacher", config.teacher),
        teachers={name: scorer(f"teachers.{name}", each) for name, each in config.teachers.items()},
        reference=scorer("reference", config.scorers.get("reference")),
    )
