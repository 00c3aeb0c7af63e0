"""Times log_prob without gradients: the net's modules in PyTorch, and the native engine's passes; in turn.

torch       our own modules on PyTorch's kernels (is_causal attention, oneDNN and MKL products), under autocast for bf16
engine      the native engine, asked for by precision=
auto        what log_prob does by itself; it should never be slower than 0.95 of the better of the two
ratio       torch / variant in the same precision (int8: torch in fp32), the median over rounds, with its 20 and 80 %
            quantiles
FLOP        the share of the arithmetic peak of the format, measured in the same run
error       the largest |log p - log p64| over 24 rows or more, in nats a dimension, against the float64 reference
"""

import statistics

import pytest
import torch
from interleave import Interleaved
from peaks import flop_rates
from workloads import WORKLOADS, build

CASES = [
    ("digits", 1), ("digits", 100), ("mnist", 1), ("mnist", 128), ("cifar", 1), ("cifar", 16), ("c768_t64", 1),
    ("c768_t64", 16),
]  # fmt: skip
JUDGED = 24  # rows at least whose errors are compared: of fewer, PyTorch's largest is a matter of luck


def flops_of(workload, B):
    """Of all blocks: products of every token, and of attention the half below the diagonal."""
    C, D, L, T = workload.channels, workload.D, workload.layers_per_block, workload.T
    return workload.num_blocks * B * (2 * T * (12 * C * C * L + 3 * C * D) + 4 * C * L * T * (T + 1) / 2)


@pytest.mark.parametrize("name, B", CASES, ids=[f"{name}-B{B}" for name, B in CASES])
def test_density(name, B, table, benchmark):
    workload = WORKLOADS[name]
    model, reference = build(workload)
    by_modules, _ = build(workload)
    by_modules.backend = "torch"
    sides = [workload.in_channels, workload.img_size, workload.img_size]

    def data(rows):
        x = torch.randn(rows, *sides, generator=torch.Generator().manual_seed(1))
        return x, torch.arange(rows) % workload.num_classes if workload.num_classes else None

    x, y = data(B)

    def half(run):
        with torch.autocast("cpu", torch.bfloat16):
            return run()

    variants = {
        "torch fp32": lambda: by_modules.log_prob(x, y),
        "torch bf16": lambda: half(variants["torch fp32"]),
        "engine fp32": lambda: model.log_prob(x, y, precision="fp32"),
        "engine bf16": lambda: model.log_prob(x, y, precision="bf16"),
        "engine int8": lambda: model.log_prob(x, y, precision="int8"),
        "auto fp32": lambda: model.log_prob(x, y),
        "auto bf16": lambda: half(variants["auto fp32"]),
    }
    with torch.no_grad():
        timed = x, y
        x, y = data(max(B, JUDGED))
        z, _, logdets = reference.double()(x.double(), y)
        dims = z[0].numel()
        truth = -0.5 * (z.square() + torch.log(torch.tensor(2 * torch.pi))).sum(dim=(1, 2)) + logdets * dims
        errors = {variant: ((run() - truth).abs().max() / dims).item() for variant, run in variants.items()}
        x, y = timed
        for variant, error in errors.items():
            plain = errors["torch fp32" if "fp32" in variant else "torch bf16"]
            assert error <= 2 * plain + 2e-6 or "int8" in variant, f"{variant}: {error}, PyTorch {plain}"
        measured = Interleaved(variants, twice=True)
        benchmark.group = f"density-{name}-B{B}"
        measured.run_round()
        once = sum(seconds[-1] for seconds in measured.seconds.values())
        rounds = max(5, min(30, int(12 / (2 * once))))
        benchmark.pedantic(
            variants["auto fp32"],
            setup=lambda: (measured.run_round(without="auto fp32"), measured.warm_up("auto fp32"))[2:],
            rounds=rounds,
            iterations=1,
        )
        for seconds in measured.seconds.values():
            del seconds[0]  # of the round that chose how many there are
        measured.seconds["auto fp32"] = list(benchmark.stats.stats.data)

    peak = flop_rates(torch.get_num_threads())
    for variant in variants:
        way, precision = variant.split()
        baseline = "torch fp32" if precision == "int8" else f"torch {precision}"
        ratios = sorted(a / b for a, b in zip(measured.seconds[baseline], measured.seconds[variant], strict=True))
        seconds = statistics.median(measured.seconds[variant])
        best = min(statistics.median(measured.seconds[f"{each} {precision}"]) for each in ("torch", "engine")
                   if f"{each} {precision}" in variants)  # fmt: skip
        row = {
            "workload": name, "B": B, "variant": variant, "T": workload.T, "C": workload.channels,
            "ms": f"{seconds * 1e3:.2f}", "rounds": len(ratios), "ratio": f"{statistics.median(ratios):.2f}",
            "p20..p80": f"{ratios[len(ratios) // 5]:.2f}..{ratios[-1 - len(ratios) // 5]:.2f}",
            "of the better": f"{best / seconds:.2f}" if way == "auto" else "-",
            "GFLOP/s": f"{flops_of(workload, B) / seconds / 1e9:.0f}",
            "FLOP": f"{flops_of(workload, B) / seconds / peak[precision]:.0%}",
            "error": f"{errors[variant]:.1e}", "seconds": [round(s, 6) for s in measured.seconds[variant]],
        }  # fmt: skip
        table("density", row)
