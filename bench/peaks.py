"""What this machine does at best, measured in the same run as what is held against it."""

from __future__ import annotations

import functools
import mmap
import time
from collections.abc import Callable

import torch

from tarflow_fast import native


@functools.cache
def _block() -> torch.Tensor:
    """512 MiB that no cache holds, in huge pages where the system has them."""
    memory = mmap.mmap(-1, 1 << 29)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.float32).fill_(1.0)


def read_rate(threads: int) -> float:
    """Bytes a second of one pass over memory.

    To be taken between the rounds of what is held against it: on a virtual machine it changes with the neighbours (47
    and 75 GB/s were seen within seconds).
    """
    block = _block()
    return _rate(lambda: native.library().tf_peak_read(block.data_ptr(), block.numel(), threads))


def peaks(threads: int) -> dict[str, float]:
    """Bytes a second read from memory, FLOP/s by fused multiply-add and by the bfloat16 dot product.

    Each the best of a few runs of a register-only or read-only loop in the native library, hence an upper bound of this
    moment. Where the processor has no bfloat16 dot product, bfloat16 is multiplied as float32 and has its peak.
    """
    library = native.library()
    read = max(read_rate(threads) for _ in range(7))
    fp32, bf16 = (
        max(
            _rate(lambda dtype=dtype: library.tf_peak_flops(native.DTYPES[dtype], 2_000_000, threads)) for _ in range(7)
        )
        for dtype in (torch.float32, torch.bfloat16)
    )
    return {"read": read, "fp32": fp32, "bf16": bf16 or fp32, "int8": bf16 or fp32}


def _rate(run: Callable[[], float]) -> float:
    """What one call does, which it returns, a second."""
    start = time.perf_counter()
    return run() / (time.perf_counter() - start)
