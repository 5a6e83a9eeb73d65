"""A student's adapter in vLLM models that run: it takes the place of the one before, and the base
stays as it is."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

from torch import Tensor
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.request import LoRARequest
from vllm.model_executor.models import ModelRegistry, supports_lora

from async_opd.core.errors import SyncFailed

# What each request asks for. vLLM reads the path of one that it does not hold, and it holds this
# from `begin` on.
ADAPTER = LoRARequest("student", 1, "it comes from the learner")


class Adapters:
    """What takes an adapter, for an engine of weight transfers; `model` is its own."""

    model: Any  # of any of vLLM's classes
    _before: LoRAModel  # what served until the last `put_adapter`

    def begin_adapter(self) -> None:
        """Serve under an adapter that changes nothing, until one comes."""
        id, manager = ADAPTER.adapter_id, self.model.lora_manager
        manager.add_adapter(manager.create_dummy_lora(id, 1, self.model.embedding_modules))
        manager.activate_adapter(id)

    def put_adapter(self, arrived: Mapping[str, Tensor]) -> None:
        """Serve under the adapter that has `arrived`: A [rank, in] and B [out, rank] of each
        module, by peft's names, B with its scale. Raises SyncFailed where a module has no place for
        it; the one before then serves on, as it does where vLLM raises."""
        model, id = self.model, ADAPTER.adapter_id
        manager = model.lora_manager
        self._before = manager.get_adapter(id)
        rank = max(len(a) for name, a in arrived.items() if name.endswith(".lora_A.weight"))
        mapper = getattr(model, "hf_to_vllm_mapper", None)
        adapter = LoRAModel.from_lora_tensors(
            id,
            dict(arrived),
            PEFTHelper(r=rank, lora_alpha=rank, target_modules=[]),  # its scale is 1
            device="cpu",
            dtype=manager.lora_config.lora_dtype,
            weights_mapper=mapper and mapper.get_rename_mapper(),
        )
        if strange := sorted(adapter.loras.keys() - set(_places(manager))):
            raise SyncFailed(
                f"sync.lora = 'adapter': vLLM's {type(model).__name__} has no place for an adapter"
                f" of {len(strange)} modules, such as {strange[0]}; with 'merged' it takes them"
            )
        with ExitStack() as failed:
            failed.callback(self.put_back_adapter)
            _replace(manager, adapter)
            failed.pop_all()

    def put_back_adapter(self) -> None:
        """Serve under the adapter that served before the last `put_adapter`, whether or not that
        came to its end."""
        _replace(self.model.lora_manager, self._before)


def takes_adapters(architecture: str, layers: Collection[str]) -> bool:
    """Tell whether vLLM's model of that name in a config.json has places for an adapter of all
    `layers`, the last parts of their names, and is its own: what it runs by transformers' code was
    not seen to agree with the learner. What it knows as made of several has none as one."""
    known = ModelRegistry.models.get(architecture)
    if known is None:
        return False
    model = known.load_model_cls()
    if not supports_lora(model) or "Transformers" in model.__name__:
        return False
    return all(model.packed_modules_mapping.get(layer, [layer]) == [layer] for layer in layers)


def _replace(manager: Any, adapter: LoRAModel) -> None:
    """Put `adapter` in the place of the one that is there."""
    manager.remove_adapter(adapter.id)
    manager.add_adapter(adapter)
    manager.activate_adapter(adapter.id)


def _places(manager: Any) -> Iterator[str]:
    """Yield the modules that may have an adapter, as a checkpoint names them: of one that vLLM
    makes of several, those."""
    for name in manager.modules:
        yield from manager.packed_modules.get(name, [name])
