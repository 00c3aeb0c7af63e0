"""Does a whole flow compute what it should, on this machine? A small one against the float64 reference."""

from __future__ import annotations

import torch
from torch import Tensor

from tarflow_fast import native
from tarflow_fast.model import TarFlow
from tarflow_fast.reference import ReferenceTarFlow
from tarflow_fast.verify.rule import largest_error_and_bound

_CONFIG = {
    "in_channels": 3,
    "img_size": (8, 12),
    "patch_size": 2,
    "channels": 128,
    "num_blocks": 3,
    "layers_per_block": 2,
    "num_classes": 4,
}


_ROWS = 32  # enough that the largest error of plain PyTorch, which sets the bound, is no accident


def verify_model(device: str) -> list[dict]:
    """One row a quantity: likelihood, gradients, plain and guided inverse, the inverse in bf16, and the round trip.

    Held to the error rule by tensor, against the float64 reference and the reference in the same precision (under
    autocast for bf16).
    """
    ours, plain, exact = _flows(device)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(_ROWS, 3, 8, 12, generator=generator).to(device)
    noise = torch.randn(_ROWS, ours.num_tokens, ours.token_size, generator=generator).to(device)
    labels = torch.arange(_ROWS, device=device) % 5 - 1  # -1: no label
    guided = {"guidance": 1.5, "attn_temp": 0.8, "annealed_guidance": True}
    rows, x = [], {}

    def compare(name: str, got: Tensor, reference: Tensor, truth: Tensor) -> None:
        error, bound = largest_error_and_bound(got, truth, reference)
        row = {"name": name, "backend": "auto", "dtype": str(got.dtype).removeprefix("torch.")}
        rows.append(row | {"worst_error": error, "bound": bound, "ok": error <= bound})

    outputs = [_forward_and_gradient(model, images, labels) for model in (ours, plain, exact)]
    for number, name in enumerate(("forward z", "forward logdets", "gradient of the loss")):
        compare(name, *(output[number] for output in outputs))
    for name, arguments in (("reverse", {}), ("reverse, guided", guided)):
        x[name] = [m.reverse(noise.to(m.var.dtype), labels, **arguments) for m in (ours, plain, exact)]
        compare(name, *x[name])
    if device == "cpu" and native.available():
        with torch.autocast("cpu", torch.bfloat16):
            half = plain.reverse(noise, labels)
        compare("reverse, bf16", ours.reverse(noise, labels, precision="bf16"), half, x["reverse"][2])
    there = [m(m.reverse(noise.to(m.var.dtype), labels), labels)[0] for m in (ours, plain)]
    compare("forward(reverse(z)) = z", *(z.detach() for z in there), noise.double())
    return rows


def _flows(device: str) -> tuple[TarFlow, ReferenceTarFlow, ReferenceTarFlow]:
    """The same weights in ours, the reference, and the reference in float64."""
    generator = torch.Generator().manual_seed(0)
    ours, plain, exact = TarFlow(**_CONFIG), ReferenceTarFlow(**_CONFIG), ReferenceTarFlow(**_CONFIG)
    with torch.no_grad():
        for block in ours.blocks:  # zero at the start of training, where a flow does nothing
            block.proj_out.weight.copy_(0.02 * torch.randn(block.proj_out.weight.shape, generator=generator))
    for model in (plain, exact):
        model.load_state_dict(ours.state_dict())
    return ours.to(device).eval(), plain.to(device).eval(), exact.to(device).double().eval()


def _forward_and_gradient(model: torch.nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    images = images.to(model.var.dtype).requires_grad_()
    z, _, logdets = model(images, labels)
    (gradient,) = torch.autograd.grad(model.get_loss(z, logdets), images)
    return z.detach(), logdets.detach(), gradient
