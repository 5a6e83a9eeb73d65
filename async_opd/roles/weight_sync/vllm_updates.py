"""A weight group and an update in the words of vLLM's engine client."""

from typing import Any

import msgspec
from vllm.v1.engine.async_llm import AsyncLLM

from async_opd.core.errors import SyncFailed
from async_opd.core.weights import WeightGroup, WeightLayout


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
    """Have all workers join `group`, wherever their last update has ended. Raises SyncFailed."""
    await _all(engine, "break_off_update")
    await _all(engine, "init_weight_transfer_engine", init_info(group))


async def take(engine: AsyncLLM, version: int, layout: WeightLayout) -> None:
    """Have all workers receive and load the weights of `version`, which labels what is sampled from
    then on. Raises SyncFailed. An adapter takes its place once every worker has all of it: where
    one has not, or does not put it there, all serve under the one before."""
    if layout.adapter:
        await _all(engine, "receive_adapter", update_info(layout))
        try:
            await _all(engine, "put_adapter")
        except SyncFailed:
            await _all(engine, "put_back_adapter")
            raise
    else:
        await _all(engine, "start_weight_update")
        await _all(engine, "update_weights", update_info(layout))
        await _all(engine, "finish_weight_update")
    await engine.update_weight_version(f"{version}")


async def _all(engine: AsyncLLM, method: str, *args: Any) -> None:
    """Have every worker do `method`; waits for all. Raises SyncFailed with what one raises."""
    failures = await engine.collective_rpc("attempt", args=(method, *args))
    for failure in filter(None, failures):
        raise SyncFailed(failure)
