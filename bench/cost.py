"""Bytes and FLOPs of an inverse by formula: what every sequential implementation must move and multiply.

A step solves one token. It reads every weight of the block once, because all R rows share the read, and for each row it
reads the keys and values of the tokens before it. There are T - 1 steps, because nothing depends on the last token.

    weights   12 C^2 L + 3 C D numbers a step            (qkv 3, proj 1, fc1 4, fc2 4;  proj_in 1 and proj_out 2 of C D)
    cache     2 C L R (i + 1) numbers read at step i, 2 C L R written
    FLOPs     2 R (weights) + 4 C L R (i + 1)

The CPU engine keeps proj_in and proj_out in float32 in every precision; the GPU path keeps them in the storage type
(end_size).
"""

from __future__ import annotations

from dataclasses import dataclass

from workloads import Workload

BYTES = {"fp32": (4, 4), "bf16": (2, 2), "int8": (1, 2)}  # bytes of a weight, bytes of a cached number


@dataclass(frozen=True)
class Cost:
    weight_bytes: float
    cache_bytes: float
    flops: float

    @property
    def bytes(self) -> float:
        return self.weight_bytes + self.cache_bytes

    def floor(self, bandwidth: float, flops: float) -> float:
        """The least seconds it can take at these peaks, if reads and arithmetic overlap perfectly."""
        return max(self.bytes / bandwidth, self.flops / flops)


def part_costs(workload: Workload, B: int, guided: bool, precision: str = "fp32", end_size: int = 4) -> dict[str, Cost]:
    """What each part of the passes costs; the parts have the names of the engine's clock.

    end_size: bytes of a weight of proj_in and proj_out.
    """
    C, D, L, T, K = (
        workload.channels,
        workload.D,
        workload.layers_per_block,
        workload.T,
        workload.num_blocks,
    )
    R = 2 * B if guided else B
    weight_size, cache_size = BYTES[precision]
    steps, reads = T - 1, (T - 1) * T / 2
    layers = {"qkv": 3 * C * C * L, "proj": C * C * L, "fc1": 4 * C * C * L, "fc2": 4 * C * C * L}
    ends = {"proj_in": C * D, "proj_out": 2 * C * D}
    costs = {
        part: Cost(K * steps * n * size, 0.0, K * steps * n * 2 * R)
        for weights, size in ((layers, weight_size), (ends, end_size))
        for part, n in weights.items()
    }
    costs["attention"] = Cost(0.0, K * 2 * C * L * R * (reads + steps) * cache_size, K * 4 * C * L * R * reads)
    return costs


def inverse_cost(workload: Workload, B: int, guided: bool, precision: str = "fp32", end_size: int = 4) -> Cost:
    costs = part_costs(workload, B, guided, precision, end_size).values()
    return Cost(*(sum(getattr(cost, name) for cost in costs) for name in ("weight_bytes", "cache_bytes", "flops")))


def weights_in_memory(workload: Workload, precision: str) -> float:
    """Bytes of one block's weights. They decide whether the weights stream from memory or stay in the cache."""
    C = workload.channels
    return 12 * C * C * workload.layers_per_block * BYTES[precision][0] + 3 * C * workload.D * 4
