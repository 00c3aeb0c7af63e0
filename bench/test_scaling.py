"""How the cost of ours and of the reference grows: over tokens T at batch 1, and over batches B at T = 64.

The flow is one block of four layers, C = 256, with tokens of 12 numbers. Its weights stay in a cache, so the arithmetic
alone bounds it. The page of the report draws the curves.
"""

import pytest
from cost import inverse_cost
from measure import Case, Variant, named
from truth import Truth
from workloads import Workload, build, inputs

CASES = [(64, 1), (1024, 1), (64, 16), (256, 1), (64, 256), (64, 4), (64, 64), (4096, 1)]
VARIANTS = ("fp32", "bf16", "reference")


def make(T, B):
    workload = Workload("C 256, 4 layers", 3, 2 * int(T**0.5), 2, 256, 1, 4)
    model, reference = build(workload)
    model.backend = "cpu"  # the native engine or an error: it must not fall back
    noise, _, _ = inputs(workload, B, False)
    truth, variants = Truth(workload, reference, noise, None, {}), {}
    for name in VARIANTS:
        precision = "fp32" if name == "reference" else name
        cost, sampler = inverse_cost(workload, B, False, precision), reference if name == "reference" else model
        asked = {} if name == "reference" else {"precision": precision}
        variants[name] = Variant(
            lambda sampler=sampler, asked=asked: sampler.reverse(noise, **asked),
            "baseline" if name == "reference" else "ours",
            judge=lambda images, precision=precision: truth.judge(precision, images, model.patchify),
            bytes=cost.bytes, flops=cost.flops, format=precision,
        )  # fmt: skip
    return Case("scaling", "reverse of one block", workload.name, B, variants, "reference", T,
                error_of="x, largest", formula="bench/cost.py", seconds=4.0)  # fmt: skip


@pytest.mark.parametrize("case, variant", named(CASES, of=lambda T, B: f"C256-T{T}-B{B}", variants=VARIANTS))
def test_block(case, variant, measured):
    measured(case, lambda: make(*case), variant)
