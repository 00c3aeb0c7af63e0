"""Times the affine op, forward and backward, in turn with plain PyTorch, and its share of the memory's speed."""

import pytest
import torch
from interleave import Interleaved, timed
from peaks import peaks

from tarflow_fast.ops import affine

SHAPES = {"digits-B128": (128, 16, 4), "cifar-B128": (128, 256, 12), "imagenet64-B64": (64, 1024, 12)}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_affine(shape, direction, table, benchmark):
    B, T, D = SHAPES[shape]
    x = torch.randn(B, T, D, requires_grad=direction == "backward")
    ab = (0.3 * torch.randn(B, T, 2 * D)).requires_grad_(x.requires_grad)
    dz, dlog_det = torch.randn(B, T, D), torch.randn(B)

    def run(backend):
        z, log_det = affine(x, ab, flip=True, backend=backend)
        if direction == "forward":
            return z, log_det
        return torch.autograd.grad((z, log_det), (x, ab), (dz, dlog_det))

    torch.testing.assert_close(run("cpu"), run("torch"), rtol=1e-5, atol=1e-4)
    measured = Interleaved({"torch": lambda: run("torch"), "cpu": lambda: run("cpu")})
    rounds = max(5, min(200, int(1.0 / sum(timed(variant) for variant in measured.variants.values()))))
    benchmark.group = f"affine-{direction}-{shape}"
    benchmark.pedantic(lambda: run("cpu"), setup=lambda: measured.run_round(without="cpu"), rounds=rounds, iterations=1)
    measured.seconds["cpu"] = list(benchmark.stats.stats.data)
    # Forward moves x and z once and ab, which is twice as long. Backward runs forward too; then its gradient reads dz,
    # x and ab, and writes dx and dab.
    numbers = B * T * D * (4 if direction == "forward" else 4 + 7)
    peak = peaks(torch.get_num_threads())["read"]
    for variant in measured.variants:
        seconds = measured.summary(variant)
        rate = 4 * numbers / seconds["median"]
        table("affine", {
            "op": f"affine {direction}", "shape": shape, "variant": variant, "us": f"{seconds['median'] * 1e6:.0f}",
            "p20..p80": f"{seconds['p20'] * 1e6:.0f}..{seconds['p80'] * 1e6:.0f}", "rounds": seconds["rounds"],
            "ratio": f"{measured.ratio(variant, 'torch'):.1f}", "GB/s": f"{rate / 1e9:.1f}",
            "memory": f"{rate / peak:.0%}",
        })  # fmt: skip
