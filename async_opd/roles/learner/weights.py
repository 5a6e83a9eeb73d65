"""The student's weights as they leave the learner, a bucket at a time."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from async_opd.core.wire import WeightLayout
from async_opd.roles.learner import lora
from async_opd.roles.weight_sync import checkpoint_names
from async_opd.roles.weight_sync.gloo import Piece, TensorMeta, buckets


class StudentWeights:
    """Gathers the weights of a model whose ranks may each hold a part; every rank calls the same
    methods. Where there is an adapter they are merged with it, by the names of the plain model."""

    def __init__(
        self,
        lm: PreTrainedModel,
        bucket_bytes: int,
        gather: Callable[[list[Tensor]], AbstractContextManager[None]],
    ):
        """`bucket_bytes` of the weights of `lm` are whole at once, while in `gather` of them."""
        self._lm = lm
        self._gather = gather
        self._bucket_bytes = bucket_bytes
        self._parameters, self._adapters = lora.plain(lm), lora.adapters(lm)
        self._pieces = checkpoint_names.pieces(lm, self._parameters)
        self.described: list[TensorMeta] = [
            meta for piece in self._pieces for meta in piece.tensors
        ]

    def layout(self) -> WeightLayout:
        """What an update carries."""
        return WeightLayout(
            names=tuple(meta.name for meta in self.described),
            dtypes=tuple(meta.dtype for meta in self.described),
            shapes=tuple(tuple(meta.shape) for meta in self.described),
        )

    def tensors(self) -> Iterator[Tensor]:
        """All weights by their checkpoint names, as they are described. Collective."""
        for bucket in self._gathered():
            for piece in bucket:
                with on_default_stream():
                    held = {name: self._merged(name) for name in piece.parameters}
                    made = list(checkpoint_names.tensors(self._lm, [piece], held))
                for tensor in made:
                    if tensor.is_cuda:  # its memory is not to be another's while it is read there
                        tensor.record_stream(torch.cuda.current_stream())
                    yield tensor

    def copied(self, keep: bool) -> dict[str, Tensor]:
        """A whole copy in host memory by the model's own names, on the ranks that `keep` it.
        Collective."""
        copies: dict[str, Tensor] = {}
        for bucket in self._gathered():
            if keep:
                copies |= {
                    name: self._merged(name).cpu() for piece in bucket for name in piece.parameters
                }
        return copies

    def adapter(self, keep: bool) -> dict[str, Tensor]:
        """A whole copy of the adapter in host memory by the names of peft's files, on the ranks
        that `keep` it. Collective."""
        trained = lora.trained(self._lm)
        with on_default_stream(), self._gather([*trained.values()]):
            return {n: p.detach().cpu().clone() for n, p in trained.items()} if keep else {}

    def _merged(self, name: str) -> Tensor:
        """The weight of that name, with what is trained beside it; it stays as it is."""
        weight, adapter = self._parameters[name].detach(), self._adapters.get(name)
        return adapter.merged(weight) if adapter else weight

    def _gathered(self) -> Iterator[list[Piece]]:
        """The weights, of which only those of the bucket in hand are whole under ZeRO-3."""
        for bucket in buckets(self._pieces, self._bucket_bytes):
            names = [name for piece in bucket for name in piece.parameters]
            beside = [self._adapters[name] for name in names if name in self._adapters]
            gathering = self._gather(
                [
                    *(self._parameters[name] for name in names),
                    *(weight for adapter in beside for weight in (adapter.a_RI, adapter.b_OR)),
                ]
            )
            with ExitStack() as whole:
                with on_default_stream():
                    whole.enter_context(gathering)
                yield bucket
                with on_default_stream():
                    whole.close()


@contextmanager
def on_default_stream() -> Iterator[None]:
    """Have what goes on inside done on the GPU's default stream, and wait until it is done; where
    there is a GPU.

    A gather is something that all ranks do, in one order. On the streams of who asks for weights it
    would stand behind broadcasts that wait for others.
    """
    if not torch.cuda.is_available():
        yield
        return
    stream = torch.cuda.default_stream()
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()
