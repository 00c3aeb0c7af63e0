"""Times log_prob without gradients: the net's modules in PyTorch, and the native engine's passes; in turn.

torch    our own modules on PyTorch's kernels (is_causal attention, oneDNN and MKL products), under autocast for bf16
engine   the native engine, asked for by precision=
auto     what log_prob does by itself; it should never be slower than 0.95 of the better of the two

The baseline of int8 is torch in fp32. Errors are the largest |log p - log p64| over 24 rows or more, in nats a
dimension, against the float64 reference. They are the same at any batch, since rows are independent.
"""

import pytest
import torch
from measure import Case, Variant, named
from workloads import WORKLOADS, build

CASES = [
    ("mnist", 128), ("digits", 1), ("c768_t64", 1), ("cifar", 16), ("digits", 100), ("mnist", 1), ("cifar", 1),
    ("c768_t64", 16),
]  # fmt: skip
JUDGED = 24  # rows at least whose errors are compared: of fewer, PyTorch's largest is a matter of luck
VARIANTS = ("engine fp32", "engine bf16", "engine int8", "auto fp32", "auto bf16", "torch fp32", "torch bf16")


def flops_of(workload, B):
    """Of all blocks: products of every token, and of attention the half below the diagonal."""
    C, D, L, T = workload.channels, workload.D, workload.layers_per_block, workload.T
    return workload.num_blocks * B * (2 * T * (12 * C * C * L + 3 * C * D) + 4 * C * L * T * (T + 1) / 2)


def make(name, B):
    workload = WORKLOADS[name]
    model, reference = build(workload)
    by_modules, _ = build(workload)
    by_modules.backend = "torch"

    def data(rows):
        sides = workload.in_channels, workload.img_size, workload.img_size
        x = torch.randn(rows, *sides, generator=torch.Generator().manual_seed(1))
        return x, torch.arange(rows) % workload.num_classes if workload.num_classes else None

    few, many = data(B), data(max(B, JUDGED))

    @torch.no_grad()
    def run(variant, rows):
        way, precision = variant.split()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16" and way != "engine"):
            asked = {"precision": precision} if way == "engine" else {}
            return (by_modules if way == "torch" else model).log_prob(*rows, **asked)

    with torch.no_grad():
        z, _, logdets = reference.double()(many[0].double(), many[1])
    dims = z[0].numel()
    truth = -0.5 * (z.square() + torch.log(torch.tensor(2 * torch.pi))).sum(dim=(1, 2)) + logdets * dims

    def error(variant):
        return ((run(variant, many) - truth).abs().max() / dims).item()

    plain = {precision: error(f"torch {precision}") for precision in ("fp32", "bf16")}
    variants = {}
    for variant in VARIANTS:
        way, precision = variant.split()
        # int8 has no plain counterpart; see truth.py for the 6
        allowed = 6 * plain["bf16"] if precision == "int8" else 2 * plain[precision] + 2e-6
        variants[variant] = Variant(
            lambda variant=variant: run(variant, few), "baseline" if way == "torch" else "ours",
            "torch fp32" if precision == "int8" else f"torch {precision}",
            lambda _, variant=variant, allowed=allowed: (error(variant), allowed), flops=flops_of(workload, B),
            format=precision,
        )  # fmt: skip
    return Case("density", "log_prob", name, B, variants, "torch fp32", workload.T, seconds=12.0,
                error_of="log p, nats a dimension, largest", formula="bench/test_density.py, flops_of")  # fmt: skip


@pytest.mark.parametrize("case, variant", named(CASES, of=lambda name, B: f"{name}-B{B}", variants=VARIANTS))
def test_log_prob(case, variant, measured):
    measured(case, lambda: make(*case), variant)
