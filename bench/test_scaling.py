"""How the cost of ours and of the reference grows: over tokens T at batch 1, and over batches B at T = 64.

The flow is one block of four layers, C = 256, with tokens of 12 numbers. The floor is the time of the arithmetic alone.
With --save, the curves are drawn too.
"""

import pytest
import torch
from cost import inverse_cost
from interleave import Interleaved, timed
from peaks import peaks
from report import results_folder
from workloads import Workload, build, inputs

TOKENS, BATCHES = (64, 256, 1024, 4096), (1, 4, 16, 64, 256)
POINTS = [("T", T, 1) for T in TOKENS] + [("B", 64, B) for B in BATCHES]
LINES = {"reference": [], "fp32": [], "bf16": [], "floor fp32": []}


@pytest.mark.parametrize(("axis", "T", "B"), POINTS)
def test_scaling(axis, T, B, table, benchmark):
    workload = Workload(f"C256-T{T}", 3, 2 * int(T**0.5), 2, 256, 1, 4)
    model, reference = build(workload)
    model.backend = "cpu"  # the native engine or an error: it must not fall back
    noise, _, _ = inputs(workload, B, False)
    variants = {
        "reference": lambda: reference.reverse(noise),
        "fp32": lambda: model.reverse(noise, precision="fp32"),
        "bf16": lambda: model.reverse(noise, precision="bf16"),
    }
    expected, got = variants["reference"](), variants["fp32"]()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3 * expected.abs().max().item())
    measured = Interleaved(variants)
    rounds = max(2, min(10, int(4 / sum(timed(run) for run in variants.values()))))
    benchmark.group = f"scaling-{axis}"
    benchmark.pedantic(variants["fp32"], setup=lambda: measured.run_round(without="fp32"), rounds=rounds, iterations=1)
    measured.seconds["fp32"] = list(benchmark.stats.stats.data)
    peak = peaks(torch.get_num_threads())
    row = {"over": axis, "T": T, "B": B}
    for variant in variants:
        seconds = measured.summary(variant)
        row[f"{variant} ms"] = f"{seconds['median'] * 1e3:.2f}"
        LINES[variant].append((axis, T if axis == "T" else B, seconds["median"], seconds["p20"], seconds["p80"]))
    cost = inverse_cost(workload, B, False)
    floor = cost.flops / peak["fp32"]  # the weights stay in the cache, so only the arithmetic is left
    LINES["floor fp32"].append((axis, T if axis == "T" else B, floor, floor, floor))
    row |= {"ratio": f"{measured.ratio('fp32', 'reference'):.1f}", "arithmetic floor ms": f"{floor * 1e3:.2f}"}
    table("scaling", row)


def test_draw(request, benchmark):
    folder = results_folder(request.config)
    if folder is None or not LINES["fp32"]:
        pytest.skip("--save NAME draws the curves")
    pytest.importorskip("matplotlib").use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.5), constrained_layout=True)
    for panel, axis, title in zip(panels, "TB", ("tokens T, batch 1", "batch B, 64 tokens"), strict=True):
        for name, points in LINES.items():
            of_axis = sorted(point[1:] for point in points if point[0] == axis)
            x, y, low, high = zip(*of_axis, strict=True)
            (line,) = panel.loglog(x, y, "--" if "floor" in name else "o-", label=name)
            panel.fill_between(x, low, high, alpha=0.2, color=line.get_color())
        panel.set(xlabel=title, ylabel="seconds a block inverse (median, 20 to 80 %)")
        panel.grid(alpha=0.3)
        panel.legend()
    folder.mkdir(parents=True, exist_ok=True)
    benchmark.pedantic(lambda: figure.savefig(folder / "scaling.png", dpi=120), rounds=1, iterations=1)
