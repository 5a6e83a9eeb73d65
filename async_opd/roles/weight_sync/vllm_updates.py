"""A weight group and an update in the words of vLLM's engine client."""

from typing import Any

import msgspec
from vllm.distributed.weight_transfer.base import (
    WeightTransferInitRequest,
    WeightTransferUpdateRequest,
)
from vllm.v1.engine.async_llm import AsyncLLM

from async_opd.core.wire import WeightGroup, WeightLayout


def init_info(group: WeightGroup) -> dict[str, Any]:
    """What vLLM's `init_weight_transfer_engine` takes to join `group`."""
    return msgspec.structs.asdict(group)


def update_info(layout: WeightLayout) -> dict[str, Any]:
    """What vLLM's `update_weights` takes."""
    return dict(
        names=list(layout.names),
        dtype_names=list(layout.dtypes),
        shapes=[list(shape) for shape in layout.shapes],
    )


async def join(engine: AsyncLLM, group: WeightGroup) -> None:
    """Have all workers join `group`, wherever their last update has ended."""
    await engine.collective_rpc("break_off_update")
    await engine.init_weight_transfer_engine(WeightTransferInitRequest(init_info(group)))


async def take(engine: AsyncLLM, version: int, layout: WeightLayout) -> None:
    """Have all workers receive and load the weights of `version`, which labels what is sampled from
    then on."""
    await engine.start_weight_update()
    await engine.update_weights(WeightTransferUpdateRequest(update_info(layout)))
    await engine.finish_weight_update(weight_version=str(version))
