"""A language model's head, and which of its ids count."""

from typing import NamedTuple

import torch
from torch import Tensor

from async_opd.core.vocabulary import Ids, others

# z of an id that is left out: its exp vanishes, and products with it are finite
LEFT_OUT = -1e30


class Without(NamedTuple):
    """Ids of a head that are left out: rows that pad it, and holes of the tokenizer's."""

    marks_V: Tensor  # bool
    first: int  # of them
    end: int  # behind the last id that is none of them

    @classmethod
    def those_but(cls, ids: Ids, size: int, device: torch.device) -> "Without | None":
        """Leave out of a head of `size` all but `ids`; None where that leaves out nothing.

        >>> Without.those_but(((0, 2), (3, 4)), 6, torch.device("cpu"))
        Without(marks_V=tensor([False, False,  True, False,  True,  True]), first=2, end=4)
        """
        marks = others(ids, size)
        if not marks.any():
            return None
        marks_V = torch.as_tensor(marks, device=device)
        return cls(marks_V, int(marks.argmax()), min(ids[-1][1], size))

    def touches(self, ids: slice) -> bool:
        """Whether any of the block `ids`, which begins before `end`, may be left out."""
        return ids.stop > self.first


class Head(NamedTuple):
    """The map from hidden states to logits: z = h Wᵀ + b, then c · tanh(z / c) where logits are
    soft-capped; without some ids, whose logits are as -∞ and whose rows get no gradient.

    Logits of half-precision hidden states are rounded to it, as the model's own are, unless they
    are read in `float32`: the products of two bfloat16 numbers are exact there, and what is left is
    the rounding of their sum. Their gradients are in the weights' precision either way.
    """

    weight_VD: Tensor
    bias_V: Tensor | None = None
    cap: float | None = None
    without: Without | None = None
    float32: bool = False  # logits of half precision are not rounded to it

    @property
    def end(self) -> int:
        """Behind the last id that is read."""
        return len(self.weight_VD) if self.without is None else self.without.end

    def leave_out(self, z_RB: Tensor, ids: slice) -> None:
        """Overwrite in z [R, B] of some `ids` what is left out."""
        if self.without and self.without.touches(ids):
            z_RB.masked_fill_(self.without.marks_V[ids], LEFT_OUT)

    def logits(self, hidden_RD: Tensor, ids: slice = slice(None)) -> Tensor:
        """Logits [R, B] of some `ids`, float32 or wider."""
        weight_BD = self.weight_VD[ids]
        bias_B = None if self.bias_V is None else self.bias_V[ids]
        if self.float32 and hidden_RD.element_size() < 4:
            z_RB = _float32_product(hidden_RD, weight_BD.T)
            if bias_B is not None:
                z_RB.add_(bias_B)
        else:
            z_RB = torch.nn.functional.linear(hidden_RD, weight_BD, bias_B)
            z_RB = z_RB.to(torch.promote_types(z_RB.dtype, torch.float32))
        return z_RB if self.cap is None else z_RB.div_(self.cap).tanh_().mul_(self.cap)


def _float32_product(one: Tensor, other: Tensor) -> Tensor:
    """Multiply matrices of half precision without rounding the result to it. A GPU does so at the
    speed of half precision; for CPUs torch has no such product."""
    if one.device.type == "cpu":
        return one.float() @ other.float()
    return torch.mm(one, other, out_dtype=torch.float32)


def add_product(total: Tensor, one: Tensor, other: Tensor) -> None:
    """Add a product of matrices to a `total` that may be wider than they are."""
    if total.dtype == one.dtype:
        total.addmm_(one, other)
    else:
        total.add_(one @ other)


def is_nothing(z: Tensor) -> Tensor:
    """Tell where z stands for no id at all, or for such as are left out."""
    return z < LEFT_OUT / 2
