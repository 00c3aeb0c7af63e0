"""Do the kernels of a transformer layer compute what they should? Each against float64 and plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from tarflow_fast.ops import attention_qkv, bias_gelu, bias_residual, layer_norm
from tarflow_fast.ops.registry import BACKENDS, OPS
from tarflow_fast.verify.rule import Worst, error_and_bound

__all__ = ["verify_layer"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_B, _T, _H, _E = 2, 197, 2, 64  # several tiles of tokens, the last one ragged
_C = _H * _E


def verify_layer(device: str) -> list[dict]:
    """One row an op, backend other than PyTorch itself, and dtype: the result and all gradients, by the error rule."""
    rows = []
    for name in _CALLS:
        for backend in BACKENDS[2:]:
            for dtype in _DTYPES:
                if not OPS[name].why_not(backend, torch.device(device), dtype):
                    rows.append(_verify(name, backend, dtype, device))
    return rows


_CALLS = {  # op: (the call, the shapes of its arguments)
    "attention": (lambda qkv, backend: attention_qkv(qkv, 0.8, backend), [(_B, _T, 3, _H, _E)]),
    "layer_norm": (lambda x, w, b, backend: layer_norm(x, w, b, backend=backend), [(_B, _T, _C), (_C,), (_C,)]),
    "bias_gelu": (lambda x, b, backend: bias_gelu(x, b, backend), [(_B, _T, 4 * _C), (4 * _C,)]),
    "bias_residual": (
        lambda x, b, h, backend: bias_residual(x, b, h, backend),
        [(_B, _T, _C), (_C,), (_B, _T, _C)],
    ),
}


def _verify(name: str, backend: str, dtype: torch.dtype, device: str) -> dict:
    call, shapes = _CALLS[name]
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]

    def everything(backend: str, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in inputs]
        out = call(*leaves, backend)
        pull = torch.linspace(-1, 1, out.numel()).view(out.shape).to(dtype).to(out)
        return out.detach(), *torch.autograd.grad(out, leaves, pull)

    truth = everything("torch", [t.double() for t in inputs])
    here = [t.to(device) for t in inputs]
    worst = Worst()
    for triple in zip(everything(backend, here), truth, everything("torch", here), strict=True):
        worst = worst.update(*error_and_bound(triple[0].cpu(), triple[1], triple[2].cpu()))
    return worst.row(name, backend, str(dtype).removeprefix("torch."))
