"""The student's weights as they leave the learner, a bucket at a time."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch
from msgspec.structs import replace
from torch import Tensor
from transformers import PreTrainedModel

from async_opd.core.errors import DataError
from async_opd.core.lora import FUSED
from async_opd.core.role_settings import LearnerSettings
from async_opd.core.weights import WeightLayout
from async_opd.roles.learner import lora
from async_opd.roles.weight_sync import checkpoint_names
from async_opd.roles.weight_sync.gloo import Piece, TensorMeta, buckets

Gather = Callable[[list[Tensor]], AbstractContextManager[None]]  # has them whole while inside


class StudentWeights:
    """Gathers the weights of a model whose ranks may each hold a part; every rank calls the same
    methods. Where there is an adapter they are merged with it, by the names of the plain model."""

    def __init__(self, lm: PreTrainedModel, bucket_bytes: int, gather: Gather):
        """`bucket_bytes` of the weights of `lm` are whole at once, while in `gather` of them."""
        self._lm = lm
        self._gather = gather
        self._bucket_bytes = bucket_bytes
        self._parameters, self._adapters = lora.plain(lm), lora.adapters(lm)
        self._pieces = checkpoint_names.pieces(lm, self._parameters)
        self._sent = travelling(self._pieces, self._adapters)
        self.described: list[TensorMeta] = [meta for piece in self._sent for meta in piece.tensors]

    def layout(self) -> WeightLayout:
        """What an update carries."""
        return WeightLayout(
            names=tuple(meta.name for meta in self.described),
            dtypes=tuple(meta.dtype for meta in self.described),
            shapes=tuple(tuple(meta.shape) for meta in self.described),
            nbytes=sum(meta.nbytes for meta in self.described),
        )

    def tensors(self) -> Iterator[Tensor]:
        """The weights that are described, by their checkpoint names. Collective."""
        for bucket in self._gathered(self._sent):
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
        for bucket in self._gathered(self._pieces):
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

    def _gathered(self, pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
        """The weights of `pieces`, of which only those of the bucket in hand are whole under
        ZeRO-3."""
        for bucket in buckets(pieces, self._bucket_bytes):
            names = [name for piece in bucket for name in piece.parameters]
            beside = [self._adapters[name] for name in names if name in self._adapters]
            halves = [half for adapter in beside for half in (adapter.a_RI, adapter.b_OR)]
            with self._whole([*(self._parameters[name] for name in names), *halves]):
                yield bucket

    @contextmanager
    def _whole(self, parameters: list[Tensor]) -> Iterator[None]:
        """Have `parameters` whole inside."""
        gathering = self._gather(parameters)
        with ExitStack() as whole:
            with on_default_stream():
                whole.enter_context(gathering)
            yield
            with on_default_stream():
                whole.close()


class AdapterAlone(StudentWeights):
    """The same, of which the adapter alone leaves: A and B of each layer, by the names of peft's
    files, but for layers whose checkpoint names them otherwise; B with its scaling."""

    def __init__(self, lm: PreTrainedModel, bucket_bytes: int, gather: Gather):
        """Raises DataError for an adapter beside a weight that the checkpoint has in parts."""
        super().__init__(lm, bucket_bytes, gather)
        self._halves: dict[str, tuple[Tensor, float]] = {}
        for piece in self._pieces:
            beside = next((name for name in piece.parameters if name in self._adapters), None)
            if beside is None:
                continue
            names = [meta.name for meta in piece.tensors]
            if len(names) > 1 or len(piece.parameters) > 1:
                raise DataError(
                    f"sync.lora = 'adapter': that of {beside} cannot travel alone, for its"
                    f" checkpoint has {', '.join(names)}; with 'merged' it does"
                )
            adapter = self._adapters[beside]
            layer = f"base_model.model.{names[0].removesuffix('.weight')}"
            self._halves[f"{layer}.lora_A.weight"] = adapter.a_RI, 1.0
            self._halves[f"{layer}.lora_B.weight"] = adapter.b_OR, adapter.scaling
        self.described = [
            TensorMeta(
                name,
                str(half.dtype).removeprefix("torch."),
                tuple(getattr(half, "ds_shape", half.shape)),
            )
            for name, (half, _) in self._halves.items()
        ]

    def layout(self) -> WeightLayout:
        """What an update carries."""
        return replace(super().layout(), adapter=True)

    def tensors(self) -> Iterator[Tensor]:
        """A and B of each layer, as they are described. Collective."""
        for bucket in buckets(self.described, self._bucket_bytes):
            halves = [self._halves[meta.name] for meta in bucket]
            with self._whole([half for half, _ in halves]):
                for half, scaling in halves:
                    with on_default_stream():
                        made = half.detach()
                        if scaling != 1:
                            made = (made.float() * scaling).to(half.dtype)
                    if made.is_cuda:
                        made.record_stream(torch.cuda.current_stream())
                    yield made


def student_weights(
    lm: PreTrainedModel, settings: LearnerSettings, gather: Gather
) -> StudentWeights:
    """What leaves of `lm`, as the settings say."""
    kind = AdapterAlone if settings.sends_adapter else StudentWeights
    return kind(lm, settings.bucket_bytes, gather)


ANY: frozenset[str] = frozenset()  # of a layer that is not known: all of its block may be one


def travelling(pieces: Sequence[Piece], adapted: Collection[str]) -> list[Piece]:
    """Choose what an update carries: of a student with an adapter the weights that are `adapted`
    and those that an engine takes together with them; of another all. Engines have the rest, for
    they load the same model."""
    if not adapted:
        return [*pieces]
    changed = {_fused(name) for name in adapted}

    def travels(name: str) -> bool:
        block, layers = _fused(name)
        return (block, layers) in changed or (block, ANY) in changed

    return [piece for piece in pieces if any(map(travels, piece.parameters))]


def _fused(name: str) -> tuple[str, frozenset[str]]:
    """Name the block of the weight of that name, and the layers of it that an engine may make one
    of."""
    layer, _, kind = name.rpartition(".")
    block, _, last = layer.rpartition(".")
    if kind not in ("weight", "bias"):  # of all experts, which are a layer of their own
        return layer, frozenset({kind})
    return block, next((layers for layers in FUSED if last in layers), ANY)


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
