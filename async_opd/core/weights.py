"""What is said of weights that travel from the learner to generators."""

from async_opd.core.message import Struct


class WeightGroup(Struct, frozen=True):
    """Where one generator's workers join the learner, who is rank 0, for updates of the weights.
    Made by the learner; consumed by a generator."""

    host: str
    port: int
    rank_offset: int  # rank of the first of them
    world: int  # members, the learner among them
    bucket_bytes: int  # of weights that travel at once
    timeout_s: float


class WeightLayout(Struct, frozen=True):
    """What an update carries, in the order in which it is sent, in checkpoint names. Made by the
    learner; consumed by a generator."""

    names: tuple[str, ...]
    dtypes: tuple[str, ...]  # as torch names them
    shapes: tuple[tuple[int, ...], ...]
    adapter: bool = False  # alone, by peft's names: the weights beneath it stay as they are
    nbytes: int = 0  # of all together
