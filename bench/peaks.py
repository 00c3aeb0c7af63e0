"""The best rates of this machine, measured in the same run as the figures that are compared with them."""

from __future__ import annotations

import functools
import mmap
import sys
import time
from collections.abc import Callable

import torch

from tarflow_fast import native


@functools.cache
def _block() -> torch.Tensor:
    """512 MiB, which no cache holds; private and in huge pages if the system has them, like the engine's own memory."""
    if not sys.platform.startswith("linux"):
        return torch.ones(1 << 27)
    size, huge = 1 << 29, 1 << 21
    memory = mmap.mmap(-1, size + huge, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.float32)
    first = -whole.data_ptr() % huge // 4
    return whole[first : first + size // 4].fill_(1.0)


def read_rate(threads: int) -> float:
    """Bytes a second of one pass over memory.

    Take it between the rounds that are compared with it, because on a virtual machine it changes with the neighbours:
    47 and 75 GB/s were seen within seconds.
    """
    block = _block()
    return _rate(lambda: native.library().tf_peak_read(block.data_ptr(), block.numel(), threads))


def flop_rates(threads: int) -> dict[str, float]:
    """FLOP/s of fused multiply-add and of the bfloat16 dot product: the best of a few runs that use registers alone.

    int8 weights are multiplied as float32. So is bfloat16 if the processor has no bfloat16 dot product.
    """
    library = native.library()
    fp32, bf16 = (
        max(
            _rate(lambda dtype=dtype: library.tf_peak_flops(native.DTYPES[dtype], 2_000_000, threads)) for _ in range(7)
        )
        for dtype in (torch.float32, torch.bfloat16)
    )
    return {"fp32": fp32, "bf16": bf16 or fp32, "int8": fp32}


def peaks(threads: int) -> dict[str, float]:
    """Both rates of this moment: "read", which is the best of a few passes, and the formats of `flop_rates`."""
    return {"read": max(read_rate(threads) for _ in range(7)), **flop_rates(threads)}


def _rate(run: Callable[[], float]) -> float:
    """The amount a second of a call that returns how much it did."""
    start = time.perf_counter()
    return run() / (time.perf_counter() - start)
