"""What a model computes in where its config does not say."""

from typing import Literal

Dtype = Literal["float32", "bfloat16"]


def dtype_on(gpus: bool, dtype: Dtype | None = None) -> Dtype:
    """Take `dtype`, or where it is absent what the machine is good at: bfloat16 on GPUs, float32 on
    CPUs.

    >>> dtype_on(True), dtype_on(False), dtype_on(True, "float32")
    ('bfloat16', 'float32', 'float32')
    """
    return dtype or ("bfloat16" if gpus else "float32")
