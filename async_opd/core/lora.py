"""What of the student is trained where that is an adapter, by LoRA."""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct
from msgspec.structs import replace

# Of adapters that vLLM's engines have a place for: one of another rank takes the next.
ENGINE_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# Layers that an engine makes one of, by the last part of their names, and takes together or not at
# all; one alone is made of none beside it.
FUSED = (
    frozenset({"q_proj", "k_proj", "v_proj"}),
    frozenset({"gate_proj", "up_proj"}),
    frozenset({"o_proj"}),
    frozenset({"down_proj"}),
)


class LoraConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An adapter of low rank beside a student that stays as it is: W + alpha/rank · B A, of which
    A and B are trained."""

    rank: Annotated[int, Meta(ge=1)]  # rows of A, columns of B
    alpha: Annotated[float, Meta(gt=0)] | None = None  # absent: the rank, a scaling of 1
    dropout: Annotated[float, Meta(ge=0, lt=1)] = 0.0  # of what goes into A, while it learns
    # Names of modules, or the ends of names behind a dot. "all-linear": every linear layer but the
    # head, and those whose names are the experts' for peft.
    target_modules: (
        Annotated[tuple[Annotated[str, Meta(min_length=1)], ...], Meta(min_length=1)]
        | Literal["all-linear"]
    ) = "all-linear"

    @property
    def scaling(self) -> float:
        """What B A is multiplied by."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def written_out(self) -> dict[str, Any]:
        """Put the settings as JSON has them, with what absent ones mean."""
        whole = replace(self, alpha=float(self.alpha or self.rank))
        return msgspec.json.decode(msgspec.json.encode(whole))

    @property
    def engine_rank(self) -> int:
        """That of the place that an engine has for it. Raises StopIteration where there is none."""
        return next(rank for rank in ENGINE_RANKS if rank >= self.rank)
