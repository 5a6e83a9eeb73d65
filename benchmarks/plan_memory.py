"""What `plan` says of a micro-batch's forward and backward against the learner's own, on fake
tensors: real shapes, no card. GiB beside weights and gradients that are whole.

    python -m benchmarks.plan_memory        # some minutes; no download
"""

from itertools import product

from async_opd.core.wire import Needs
from async_opd.tools.plan.shape import _shipped
from tests.tools.plan.fake_step import Step

GIB = 2**30
MODELS = ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-1.7B", "Qwen/Qwen3-4B", "Qwen/Qwen3-8B")
LENGTHS = {"4k": (4096,), "16k": (16384,), "8k and 32 short": (8192, *[256] * 32)}
OTHERS = [
    ("Qwen/Qwen3-30B-A3B", "4k", {}),
    ("meta-llama/Llama-3.1-8B", "16k", {}),
    ("Qwen/Qwen2.5-7B", "16k", {}),
    ("Qwen/Qwen3-1.7B", "8k and 32 short", dict(dtype="float32")),
    ("Qwen/Qwen3-1.7B", "16k", dict(needs=Needs(student_entropy=True, tail=True))),
]


def main() -> None:
    print("| model | tokens | checkpointing | fake step | plan | off |")
    print("|---|---|---|---|---|---|")
    rows = [
        (model, length, {}, checkpointing)
        for model, length, checkpointing in product(MODELS, LENGTHS, (True, False))
    ]
    rows += [(*other, checkpointing) for other, checkpointing in product(OTHERS, (True, False))]
    for model, length, rest, checkpointing in rows:
        step = Step(
            tree=_shipped()[model],
            lengths=LENGTHS[length],
            checkpointing=checkpointing,
            **rest,
        )
        measured, planned = step.measured() / GIB, step.planned() / GIB
        what = ", ".join([length, *(str(value) for key, value in rest.items() if key == "dtype")])
        what += ", entropy and tail" if "needs" in rest else ""
        print(
            f"| {model} | {what} | {'on' if checkpointing else 'off'} | {measured:.2f} |"
            f" {planned:.2f} | {planned / measured - 1:+.1%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
