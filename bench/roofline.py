"""`python bench/roofline.py` prints what exact sequential sampling must move and multiply, and the least time it takes.

It uses the formulas of cost.py for 16-bit weights and cache and 8 flow blocks. The peaks are those of the data sheet of
an H200 SXM (4.8 TB/s, 989 TFLOP/s bf16) and those measured on one (4.3 TB/s copied, 790 TFLOP/s). Nothing here is a
measurement of this code.
"""

import dataclasses

import gpu_bare  # noqa: F401
from cost import inverse_cost
from workloads import WORKLOADS

PEAKS = {"data sheet": (4.8e12, 989e12), "measured": (4.3e12, 790e12)}
MODELS, BATCHES, BLOCKS = ("imagenet64", "afhq256", "imagenet128"), (1, 16, 128), 8


def rows():
    bandwidth, arithmetic = PEAKS["measured"]
    for name in MODELS:
        workload = dataclasses.replace(WORKLOADS[name], num_blocks=BLOCKS)
        steps = BLOCKS * (workload.T - 1)
        for B in BATCHES:
            for guided in (False, True):
                cost = inverse_cost(workload, B, guided, "bf16", end_size=2)
                floors = {peak: cost.floor(*limits) for peak, limits in PEAKS.items()}
                yield {
                    "model": name,
                    "B": B,
                    "guided": "yes" if guided else "no",
                    "weights MB/step": f"{cost.weight_bytes / steps / 1e6:.0f}",
                    "cache MB/step": f"{cost.cache_bytes / steps / 1e6:.0f}",
                    "GFLOP/step": f"{cost.flops / steps / 1e9:.2f}",
                    "bound by": "memory" if cost.bytes / bandwidth > cost.flops / arithmetic else "math",
                    **{f"us/step, {peak}": f"{floor / steps * 1e6:.1f}" for peak, floor in floors.items()},
                    **{f"s/batch, {peak}": f"{floor:.3f}" for peak, floor in floors.items()},
                    "ms/image, measured": f"{floors['measured'] / B * 1e3:.1f}",
                }


def table():
    found = list(rows())
    widths = {key: max(len(key), *(len(str(row[key])) for row in found)) for key in found[0]}
    lines = ["  ".join(key.rjust(width) for key, width in widths.items())]
    lines += ["  ".join(str(row[key]).rjust(width) for key, width in widths.items()) for row in found]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
