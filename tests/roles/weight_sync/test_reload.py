"""vLLM's layerwise reload broken off and begun again: `tests/ray/test_families.py` does it with
whole models."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what torch imports for vLLM
    from vllm.model_executor.model_loader.reload import layerwise

    from async_opd.roles.weight_sync import reload

CPU = torch.device("cpu")
SHARDS = {"q": 0, "k": 1, "v": 2}


class Fused(nn.Module):
    """As `qkv_proj`: three shards of one parameter, and a bias of three."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(6, 4), requires_grad=False)
        self.scale = nn.Parameter(torch.zeros(6), requires_grad=False)
        for parameter in self.parameters():
            parameter.weight_loader = self.load

    @staticmethod
    def load(param, loaded, shard):
        rows = slice(2 * SHARDS[shard], 2 * SHARDS[shard] + 2)
        param.data[rows].copy_(loaded)


class Experts(nn.Module):
    """As `experts`: a parameter of all experts, whose two halves come expert by expert."""

    def __init__(self):
        super().__init__()
        self.w13_weight = nn.Parameter(torch.zeros(3, 4, 4), requires_grad=False)
        self.w13_weight.weight_loader = self.load

    @staticmethod
    def load(param, loaded, shard):
        expert, half = shard
        param.data[expert, 2 * half : 2 * half + 2].copy_(loaded)


class Model(nn.Module):
    """Loads as vLLM's models do."""

    def __init__(self):
        super().__init__()
        self.a, self.experts, self.b = Fused(), Experts(), Fused()
        layerwise.record_metadata_for_reloading(self)

    def load_weights(self, items):
        parameters = dict(self.named_parameters())
        for name, shard, weight in items:
            parameters[name].weight_loader(parameters[name], weight, shard)


def items(value: float) -> list:
    whole = []
    for layer in "ab":
        whole += [(f"{layer}.weight", s, torch.full((2, 4), value)) for s in SHARDS]
        whole += [(f"{layer}.scale", s, torch.full((2,), value)) for s in SHARDS]
    experts = [((e, half), torch.full((2, 4), value)) for e in range(3) for half in (0, 1)]
    whole[6:6] = [("experts.w13_weight", *each) for each in experts]
    return whole


def updated(model: Model, value: float) -> None:
    reload.begin(model, CPU)
    model.load_weights(items(value))
    reload.finish(model, SimpleNamespace(dtype=torch.float32))


def values(model: Model) -> set[float]:
    return {value for weight in model.parameters() for value in weight.flatten().tolist()}


@pytest.mark.parametrize("came", range(len(items(0.0)) + 1))
def test_after_an_update_that_broke_off_anywhere_a_whole_one_leaves_nothing_old(came):
    model = Model()
    updated(model, 1.0)
    tensors = [weight.data_ptr() for weight in model.parameters()]  # CUDA graphs read them
    reload.begin(model, CPU)
    model.load_weights(items(2.0)[:came])
    reload.break_off(model)
    assert values(model) <= {1.0, 2.0}  # no weight is left on the meta device
    reload.break_off(model)  # again, as every join does
    updated(model, 3.0)
    assert values(model) == {3.0}
    assert [weight.data_ptr() for weight in model.parameters()] == tensors


def test_layers_for_which_nothing_comes_stay_and_nobody_is_warned(monkeypatch):
    warned: list[str] = []
    monkeypatch.setattr(layerwise.logger, "handle", warned.append)
    model = Model()
    updated(model, 1.0)
    reload.begin(model, CPU)
    model.load_weights([item for item in items(2.0) if item[0].startswith("a.")])
    reload.finish(model, SimpleNamespace(dtype=torch.float32))
    assert {float(weight.max()) for weight in model.a.parameters()} == {2.0}
    assert {float(weight.max()) for weight in model.b.parameters()} == {1.0}
    assert not warned


def test_nothing_is_to_be_forgotten_before_the_first_update():
    model = Model()
    reload.break_off(model)
    updated(model, 1.0)
    assert values(model) == {1.0}
