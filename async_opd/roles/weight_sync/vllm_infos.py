"""A weight group and the layout of an update in the words of vLLM's weight-transfer engines."""

from typing import Any

import msgspec

from async_opd.core.wire import WeightGroup, WeightLayout


def init_info(group: WeightGroup, backend: str) -> dict[str, Any]:
    """What vLLM's `init_weight_transfer_engine` takes to join `group`."""
    if backend == "gloo":
        return msgspec.structs.asdict(group)
    return dict(
        master_address=group.host,
        master_port=group.port,
        rank_offset=group.rank_offset,
        world_size=group.world,
        packed=True,
        packed_buffer_size_bytes=group.bucket_bytes,
    )


def update_info(layout: WeightLayout) -> dict[str, Any]:
    """What vLLM's `update_weights` takes."""
    return dict(
        names=list(layout.names),
        dtype_names=list(layout.dtypes),
        shapes=[list(shape) for shape in layout.shapes],
    )
