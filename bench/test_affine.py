"""Times the affine op, forward and backward, in turn with plain PyTorch, and its share of the memory's speed.

Forward moves x and z once and ab, which is twice as long. Backward runs forward too; then its gradient reads dz, x and
ab, and writes dx and dab. What fits a cache is bound by its arithmetic, of which an exp counts as one operation.
"""

import pytest
import torch
from measure import Case, Variant, named

from tarflow_fast.ops import affine

SHAPES = {"cifar": (128, 256, 12), "imagenet64": (64, 1024, 12), "digits": (128, 16, 4)}
CASES = [(name, B, direction) for name, (B, _, _) in SHAPES.items() for direction in ("forward", "backward")]
CACHE = 16e6  # bytes; what is smaller stays in a cache, so the memory does not bound it


def make(name, B, direction):
    _, T, D = SHAPES[name]
    x = torch.randn(B, T, D, requires_grad=direction == "backward")
    ab = (0.3 * torch.randn(B, T, 2 * D)).requires_grad_(x.requires_grad)
    dz, dlog_det = torch.randn(B, T, D), torch.randn(B)

    def run(backend, cast=lambda tensor: tensor):
        given = [cast(each).detach().requires_grad_(each.requires_grad) for each in (x, ab)]
        z, log_det = affine(*given, flip=True, backend=backend)
        if direction == "forward":
            return z, log_det
        return torch.autograd.grad((z, log_det), given, (cast(dz), cast(dlog_det)))

    truth = run("torch", torch.Tensor.double)

    def error(found):
        return max((a - b).abs().max().item() for a, b in zip(found, truth, strict=True))

    plain, size = error(run("torch")), max(each.abs().max().item() for each in truth)
    allowed = 2 * plain + 2 * torch.finfo(torch.float32).eps * size
    moved, flops = (4.0 * B * T * D * n for n in ((4, 1) if direction == "forward" else (4 + 7, 2)))
    variants = {
        name: Variant(lambda name=name: run(name), "ours" if name == "cpu" else "baseline",
                      judge=lambda found: (error(found), allowed), bytes=moved, flops=flops,
                      streams=moved > CACHE)
        for name in ("cpu", "torch")
    }  # fmt: skip
    return Case("affine", "affine", f"{name}, {direction}", B, variants, "torch", T, error_of="results, largest",
                seconds=1.0,
                formula="numbers: 4 B T D forward, 11 with its backward; operations: 4 B T D, and 8")  # fmt: skip


def name_of(name, B, direction):
    return f"{name}-{direction}-B{B}"


@pytest.mark.parametrize("case, variant", named(CASES, of=name_of, variants=("cpu", "torch")))
def test_affine(case, variant, measured):
    measured(name_of(*case), lambda: make(*case), variant)
