"""How many kernels reading log-probs launches on a GPU, counted on the device that stands for
one."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from async_opd.maths.logprobs import Head, ReadOptions, read_logprobs

VIEWS = ("view", "slice", "select", "transpose", "t", "detach", "expand", "unsqueeze", "squeeze")
VIEWS += ("_unsafe_view", "alias", "permute", "as_strided", "split", "empty_like")


class Launches(TorchDispatchMode):
    """Counts operations that are no views of what is there."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.__name__.split(".")[0] not in VIEWS
        return function(*args, **(kwargs or {}))


def meta(*shape, dtype=torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, device="meta", dtype=dtype).requires_grad_(dtype.is_floating_point)


@pytest.mark.parametrize(
    ("options", "candidates", "float32", "most"),
    [
        (ReadOptions(1.0), 0, False, 870),
        (ReadOptions(1.0), 32, False, 870),
        (ReadOptions(1.0), 32, True, 870),
        (ReadOptions(1.0, entropy=True), 32, False, 1130),
        (ReadOptions(1.0, topk=32, tail=True), 0, False, 1410),
        (ReadOptions(1.0, entropy=True, topk=32, tail=True), 32, False, 1900),
    ],
)
def test_16384_tokens_of_a_large_vocabulary_take_few_launches(options, candidates, float32, most):
    tokens, vocabulary, width = 16384, 151_936, 2048
    ids = meta(tokens, dtype=torch.int64)
    with Launches() as launches:
        read = read_logprobs(
            meta(tokens, width),
            Head(meta(vocabulary, width), float32=float32),
            ids,
            options,
            candidate_ids_NK=meta(tokens, candidates, dtype=torch.int64) if candidates else None,
        )
        sum(x.sum() for x in read if x is not None and x.requires_grad).backward()
    assert launches.count <= most, launches.count
