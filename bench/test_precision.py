"""What bfloat16 and int8 change in the images, when each inverts the same noise, and how long each takes.

The table has the differences to float32 in steps of an 8-bit pixel (2 / 255), over all pixels of all images: the
median, the 99 % quantile, the largest and the root mean square. Flows with labels are guided.
"""

import pytest
import torch
from interleave import Interleaved, timed
from photographs import FOLDER, photograph_flow

from tarflow_fast import TarFlow
from tarflow_fast.flows import SHIPPED

FLOWS = {
    "digits": lambda: TarFlow.from_pretrained(SHIPPED["digits"], dtype=torch.float32),
    "photographs": photograph_flow,
}
PRECISIONS = ("fp32", "bf16", "int8")
B = 100


@pytest.mark.parametrize("flow", FLOWS, ids=[f"{name}-B{B}-fp32" for name in FLOWS])
def test_precision(flow, table, budget, benchmark):
    if flow == "photographs" and not (FOLDER / "run" / "model" / "model.safetensors").exists():
        budget.needs(600)  # the flow is trained first
    model = FLOWS[flow]()
    model.backend = "cpu"  # the native engine or an error: it must not fall back
    y = torch.arange(B) % model.num_classes if model.num_classes else None
    noise = torch.randn(B, *model.var.shape, generator=torch.Generator().manual_seed(0))
    arguments = {"guidance": 1.0} if model.num_classes else {}

    def run(precision):
        return model.reverse(noise, y, **arguments, precision=precision)

    images = {precision: run(precision) for precision in PRECISIONS}
    assert all(image.isfinite().all() for image in images.values())
    measured = Interleaved({precision: lambda precision=precision: run(precision) for precision in PRECISIONS})
    once = sum(timed(variant) for variant in measured.variants.values())
    rounds = budget.rounds(once, 5, max(5, min(50, int(10 / once))))
    benchmark.group = f"precision-{flow}"
    benchmark.pedantic(
        lambda: run("fp32"), setup=lambda: measured.run_round(without="fp32"), rounds=rounds, iterations=1
    )
    measured.seconds["fp32"] = list(benchmark.stats.stats.data)
    for precision in PRECISIONS:
        steps = ((images[precision] - images["fp32"]) * 127.5).abs().flatten()
        seconds = measured.summary(precision)
        table("precision", {
            "flow": flow, "B": B, "precision": precision, "ms": f"{seconds['median'] * 1e3:.1f}",
            "ratio to fp32": f"{measured.ratio(precision, 'fp32'):.2f}", "median": f"{steps.median():.3f}",
            "99 %": f"{steps.kthvalue(int(0.99 * len(steps))).values:.3f}", "largest": f"{steps.max():.2f}",
            "rms": f"{steps.square().mean().sqrt():.3f}",
        })  # fmt: skip
