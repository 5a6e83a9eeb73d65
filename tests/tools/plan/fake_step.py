"""A learner's own forward and backward on fake tensors: real shapes, no memory, no card.

torch built without CUDA runs no backward of fake CUDA tensors, so these are on the CPU, with the
choices of a card: attention takes packed segments as they lie in half precision, and has no fused
kernel for grouped queries in float32. What a kernel allocates for itself is not seen.
"""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from async_opd.core.lora import LoraConfig
from async_opd.core.wire import Needs
from async_opd.maths import blocks
from async_opd.roles.learner import lora
from async_opd.roles.learner.batch import TrainingBounds, pack
from async_opd.roles.learner.config import LearnerConfig
from async_opd.roles.learner.step import Student
from async_opd.roles.models import attention, causal_lm
from async_opd.tools.plan import memory, passes
from async_opd.tools.plan.adapter import adapter
from async_opd.tools.plan.shape import read
from tests.roles.learner.trajectories import trajectory
from tests.tensor_memory import TensorMemory

CPU = torch.device("cpu")
NOTHING = Needs()


def _taken(weight: Tensor) -> None:
    weight.grad = None


def varlen(module, query, key, value, mask, *, segment_lengths, scaling=None, **_):
    """Attend inside packed segments by torch's own kernel, as on a card in half precision."""
    segments = attention.Segments.of(segment_lengths)
    return attention.varlen(query, key, value, segments, scaling), None


@dataclass(frozen=True, kw_only=True)
class Step:
    """One micro-batch of a model whose config.json is `tree`."""

    tree: dict
    lengths: tuple[int, ...]
    checkpointing: bool
    dtype: str = "bfloat16"
    rows: int = 16384  # of the head, at a time
    needs: Needs = NOTHING
    lora: LoraConfig | None = None

    def measured(self) -> int:
        """Count the bytes that its forward and backward hold at most, beside weights and gradients
        that are whole: those the optimizer takes at once."""
        half = self.dtype != "float32"
        AttentionInterface.register(
            causal_lm.ATTENTION, varlen if half else attention.packed_segments
        )
        short, attention.SHORT = attention.SHORT, 0
        block, blocks.ON_CPU = blocks.ON_CPU, blocks.ON_GPU
        try:
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                student, micro = self._student(), self._micro(mode)
                trained = (weight for weight in student.parameters() if weight.requires_grad)
                for weight in trained:
                    weight.register_post_accumulate_grad_hook(_taken)
                with (
                    nullcontext() if half else sdpa_kernel(SDPBackend.MATH),
                    TensorMemory() as held,
                ):
                    read = student(micro, self.needs)
                    sum(x.sum() for x in read if x is not None and x.requires_grad).backward()
            return held.most
        finally:
            attention.SHORT = short
            blocks.ON_CPU = block
            AttentionInterface.register(causal_lm.ATTENTION, attention.packed_segments)

    def planned(self) -> float:
        """Estimate the same."""
        shape = read(self._config().to_dict(), "student.model")
        batch = passes.packed(shape, [*self.lengths], padded=self.dtype == "float32")
        config = LearnerConfig(
            trajectories_per_step=1,
            lr=1e-4,
            dtype=self.dtype,
            head_chunk_rows=self.rows,
            gradient_checkpointing=self.checkpointing,
        )
        beside = adapter(self.lora, shape) if self.lora else None
        return memory.passed(config, shape, batch, self.needs, beside)

    def _config(self):
        return AutoConfig.for_model(**{k: v for k, v in self.tree.items() if k != "contexts"})

    def _student(self) -> Student:
        lm = AutoModelForCausalLM.from_config(
            self._config(),
            attn_implementation=causal_lm.ATTENTION,
            dtype=getattr(torch, self.dtype),
        )
        causal_lm._give_padding_its_gradient(lm)
        if self.lora:
            self._wrap(lm)
        lm.train()
        if self.checkpointing:
            lm.gradient_checkpointing_enable({"use_reentrant": False})
        return Student(lm, temperature=1.0, chunk_rows=self.rows)

    def _wrap(self, lm) -> None:
        """Put the adapter beside it, made where and as its weights are: fake ones cannot be
        moved."""
        with patch.object(torch.nn.Module, "to", lambda module, *_, **__: module):
            torch.set_default_dtype(getattr(torch, self.dtype))
            try:
                lora.wrap(lm, self.lora, 0)
            finally:
                torch.set_default_dtype(torch.float32)

    def _micro(self, mode: FakeTensorMode):
        packed = pack(
            [trajectory(1, [(0, n - 1)], id=f"{i}#0") for i, n in enumerate(self.lengths)],
            TrainingBounds(max_lag_steps=1, stale="mask", truncated="train", cap=max(self.lengths)),
            live=0,
            device=CPU,
        )
        tensors = {name: x for name, x in vars(packed).items() if isinstance(x, Tensor)}
        return replace(packed, **{name: mode.from_tensor(x) for name, x in tensors.items()})
