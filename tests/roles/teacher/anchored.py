"""An objective that asks for a reference. No direct subclass: those are what a run lists."""

from msgspec.structs import replace

from async_opd.objectives.topk_kl import TopkKl


class Anchored(TopkKl, tag="anchored"):
    """The divergence itself; the reference is only supplied."""

    def needs(self):
        return replace(super().needs(), reference=True)
