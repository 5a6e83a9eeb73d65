"""The checks, by name, and what each needs; what a check imports, its own process does."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from tests.gpu.place import Place, Record

RUNS = ("vllm", "ray", "deepspeed", "psutil", "pytest")


@dataclass(frozen=True)
class Check:
    """One path on cards. `function` is "module:name" of this folder."""

    name: str
    function: str
    options: Mapping[str, Any] = field(default_factory=dict)
    cards: int = 1
    packages: tuple[str, ...] = ()
    rehearsed: bool = True  # has something to do on a CPU

    def run(self, place: Place, record: Record) -> None:
        """Run it here. Raises AssertionError where what must hold does not, and Unfit."""
        module, name = self.function.split(":")
        getattr(import_module(f"tests.gpu.{module}"), name)(place, record, **self.options)

    def lacking(self, cards: int, *, rehearsal: bool) -> str:
        """Say what it needs and a machine with so many cards has not; "" where it can run."""
        if rehearsal:
            lacks = "" if self.rehearsed else "has nothing to rehearse on CPUs"
        else:
            needed = f"needs {self.cards} card{'s' * (self.cards > 1)}, {cards} here"
            lacks = needed if cards < self.cards else ""
        missing = [package for package in self.packages if find_spec(package) is None]
        return lacks or (f"needs {', '.join(missing)}: not installed" if missing else "")


def _zero(stage: int, cards: int = 1, **settings: Any) -> Check:
    """A learner of so many ranks at that ZeRO stage."""
    offloaded = ", optimizer on the host" if settings else ""
    return Check(
        f"{'rank' if cards == 1 else f'{cards} ranks'}, ZeRO {stage}{offloaded}",
        "ranks:train",
        {"zero_stage": stage, "ranks": cards, **settings},
        cards=cards,
        packages=("deepspeed",),
    )


def _on_cards(*args: Any, **settings: Any) -> Check:
    """A check that has nothing to rehearse."""
    return Check(*args, rehearsed=False, **settings)


ENGINE = ("vllm", "deepspeed")
SHARED = (
    "run.share_gpu=true",
    "rollout.gpu_memory_utilization=0.2",
    "teacher.gpu_memory_utilization=0.2",
)
SELF = (
    "teacher.model=toy:student",
    "teacher.backend=transformers",
    "teacher.update=ema",
    "learner.offload_optimizer=true",
    "sync.kv=keep",
)
DRAFTS = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1}
# of few ids, which come again: there is something to draft, and to accept
SPECULATION = {"engine": {"speculative_config": DRAFTS}, "known": 8}
APART = ("sync.backend=nccl",)
CHECKS = (
    # needs torch, transformers and this repository
    Check("attention", "attention:packed"),
    Check("attention, float32", "attention:float32"),
    Check("head", "head:settings"),
    Check("learner, checkpointing", "student:step", {"checkpointing": True}),
    Check("learner, no checkpointing", "student:step", {"checkpointing": False}),
    Check("learner, kernels", "student:kernels"),
    Check("gloo, lost peer", "peers:lost", {"backend": "gloo"}),
    # and DeepSpeed
    _zero(1),
    _zero(2),
    _zero(3),
    _zero(1, offload_optimizer=True),
    _zero(2, cards=2),
    _zero(3, cards=2),
    # and vLLM
    Check("packed transfer", "transfer:packed", packages=("vllm",)),
    Check(
        "nccl, lost peer",
        "peers:lost",
        {"backend": "nccl"},
        cards=2,
        packages=("vllm",),
        rehearsed=False,
    ),
    Check("teacher, sampled", "teachers:arrays", packages=("vllm",)),
    Check("teacher, top 32", "teachers:arrays", {"k": 32}, packages=("vllm",)),
    Check(
        "teacher, top 32 of some ids",
        "teachers:arrays",
        {"k": 32, "known": 4000},
        packages=("vllm",),
    ),
    _on_cards("teacher, given ids", "teachers:arrays", {"given": 32}, packages=("vllm",)),
    _on_cards(
        "teacher, fp8",
        "teachers:arrays",
        {"k": 32, "engine": {"quantization": "fp8"}},
        packages=("vllm",),
    ),
    Check("parity", "updates:parity", packages=ENGINE),
    Check("update in flight, gloo", "updates:in_flight", {"backend": "gloo"}, packages=ENGINE),
    Check(
        "update in flight, nccl",
        "updates:in_flight",
        {"backend": "nccl"},
        cards=2,
        packages=ENGINE,
        rehearsed=False,
    ),
    Check(
        "update in flight, gloo, TP 2",
        "updates:in_flight",
        {"backend": "gloo", "ranks": 2},
        cards=2,
        packages=ENGINE,
        rehearsed=False,
    ),
    Check(
        "update in flight, nccl, TP 2",
        "updates:in_flight",
        {"backend": "nccl", "ranks": 2},
        cards=3,
        packages=ENGINE,
        rehearsed=False,
    ),
    Check("tokens a second, kv recomputed", "updates:throughput", packages=ENGINE),
    Check("tokens a second, kv kept", "updates:throughput", {"keeps_kv": True}, packages=ENGINE),
    Check("candidates, sampled", "updates:candidates", packages=ENGINE),
    _on_cards(
        "speculation",
        "updates:in_flight",
        {"backend": "gloo", **SPECULATION},
        packages=ENGINE,
    ),
    _on_cards(
        "fp8 KV",
        "updates:in_flight",
        {"backend": "gloo", "engine": {"kv_cache_dtype": "fp8"}},
        packages=ENGINE,
    ),
    # and Ray
    Check("run, one card", "runs:three_steps", {"overrides": SHARED}, packages=RUNS),
    Check("run, self-teacher", "runs:three_steps", {"overrides": (*SHARED, *SELF)}, packages=RUNS),
    *(
        Check(
            f"run, adapter sent {how}",
            "runs:three_steps",
            {"overrides": (*SHARED, "student.lora.rank=8", f"sync.lora={how}")},
            packages=RUNS,
            rehearsed=False,
        )
        for how in ("merged", "adapter")
    ),
    Check(
        "run, a card each",
        "runs:three_steps",
        {"overrides": APART},
        cards=3,
        packages=RUNS,
        rehearsed=False,
    ),
    Check(
        "killed generator, one card", "runs:killed_generator", {"overrides": SHARED}, packages=RUNS
    ),
    Check(
        "killed generator, a card each",
        "runs:killed_generator",
        {"overrides": APART},
        cards=4,
        packages=RUNS,
        rehearsed=False,
    ),
)
