"""What this machine does at best, measured in the same run as what is held against it."""

from __future__ import annotations

import functools
import time

import torch

from tarflow_fast import native


@functools.cache
def peaks(threads: int) -> dict[str, float]:
    """Bytes a second read from memory, FLOP/s by fused multiply-add and by the bfloat16 dot product.

    Each the best of a few runs of a register-only or read-only loop in the native library, hence an upper bound. Where
    the processor has no bfloat16 dot product, bfloat16 is multiplied as float32 and has its peak.
    """
    library = native.library()
    block = torch.ones(1 << 27)  # 512 MiB: no cache holds it

    def best(run, rounds: int = 7) -> float:
        rates = []
        for _ in range(rounds):
            start = time.perf_counter()
            done = run()
            rates.append(done / (time.perf_counter() - start))
        return max(rates)

    read = best(lambda: library.tf_peak_read(block.data_ptr(), block.numel(), threads))
    fp32 = best(lambda: library.tf_peak_flops(native.DTYPES[torch.float32], 2_000_000, threads))
    bf16 = best(lambda: library.tf_peak_flops(native.DTYPES[torch.bfloat16], 2_000_000, threads))
    return {"read": read, "fp32": fp32, "bf16": bf16 or fp32, "int8": bf16 or fp32}
