"""How a vLLM engine is started without a GPU, for generators and teachers alike. This file itself
does without vLLM."""

import os
from typing import Any


def cpu_engine(memory_gib: float, *, enforce_eager: bool) -> dict[str, Any]:
    """Make engine arguments for CPU. Sets what the engine's process reads from the environment it
    inherits: one OpenMP thread, not bound to a core, no worker process of its own (idle vLLM must
    not spin on a core that others need), whole GiB of KV cache, and whether PyTorch may compile:
    vLLM's `enforce_eager` alone leaves a function of its sampler to be compiled, which needs a C++
    compiler and two seconds at the first token."""
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        **os.environ,  # what is set already stays, but for what follows
        "VLLM_CPU_KVCACHE_SPACE": str(max(1, round(memory_gib))),
        "TORCH_COMPILE_DISABLE": "1" if enforce_eager else "0",
    }
    return {"distributed_executor_backend": "uni", "enforce_eager": enforce_eager}
