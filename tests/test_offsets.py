"""The kernels' offsets are wide enough for tensors of more than 2**31 numbers.

On a CPU only the pages that are used take memory.
"""

import math
import mmap

import pytest
import torch
from torch.nn import functional as F

from tarflow_fast.ops import attention
from tarflow_fast.ops.registry import triton_missing, triton_refuses

pytestmark = pytest.mark.interpreter
FAR = 2**31


@pytest.fixture(autouse=True)
def only_where_it_runs(device):
    if why_not := triton_refuses(device, torch.float16) or triton_missing():
        pytest.skip(why_not)


def vast(*shape, dtype, device):
    """A tensor that is never filled. On a CPU its pages take no memory until they are written."""
    size = math.prod(shape) * dtype.itemsize
    assert math.prod(shape) > FAR
    if device.type == "cuda":
        if torch.cuda.mem_get_info(device)[0] < 1.2 * size:
            pytest.skip(f"the GPU has fewer than {size} bytes left")
        return torch.empty(shape, dtype=dtype, device=device)
    no_reserve = 0x4000  # MAP_NORESERVE, which Python names since 3.13
    try:
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    except OSError as error:
        pytest.skip(f"there is no address space of {size} bytes: {error}")
    return torch.frombuffer(pages, dtype=dtype).view(shape)


def scratch(device):
    """Scratch tensors with room for one split and a few queries."""
    kinds = {"partials": torch.float32, "sums": torch.float32, "counters": torch.int32, "normalized": torch.float16}
    return {name: torch.zeros(4096, dtype=kind, device=device) for name, kind in kinds.items()}


def test_the_cache_of_a_step(device):
    """Keys and values of the last row lie past 2**31. One kernel appends them, and the next one reads them."""
    from tarflow_fast.kernels.triton.cached_attention import cached_attention
    from tarflow_fast.kernels.triton.step_linear import Append, Norm, linear

    R, H, E, T = 2, 1, 16, 2**26 + 5
    C = H * E
    cache = vast(2, R, H, T, E, dtype=torch.float16, device=device)
    h, weight = torch.randn(R, C, device=device), (torch.randn(3 * C, C, device=device) / 4).half()
    ones, zeros = torch.ones(C, device=device), torch.zeros(3 * C, device=device)
    queries = torch.empty(R, C, dtype=torch.float16, device=device)
    starts = torch.tensor([[3, T - 2], [0, 0]], dtype=torch.int32, device=device)
    space = scratch(device)
    linear(
        h, weight, zeros, out=queries, scratch=space, epilogue="append", norm=Norm(ones, zeros[:C], 1e-5),
        append=Append(cache, starts, 1), tuned_queries=17,
    )  # fmt: skip
    qkv = F.linear(F.layer_norm(h, (C,)), weight.float())
    for row, at in ((0, 3), (1, T - 2)):
        for part in (0, 1):
            expected = qkv[row, (part + 1) * C : (part + 2) * C]
            torch.testing.assert_close(cache[part, row, 0, at].float(), expected, rtol=1e-2, atol=1e-2)

    cache[:, :, :, :3] = torch.randn(2, R, H, 3, E, device=device).half()
    cache[:, 1, :, 3] = cache[:, 1, :, T - 2]
    starts[0] = 3
    out, scale = torch.empty_like(queries), torch.full((R,), math.log2(math.e) / 4, device=device)
    cached_attention(queries, cache, scale=scale, starts=starts, out=out, scratch=space, W=1, tuned_rows=1000)
    keys, values = cache[:, :, :, :4].float()
    expected = F.scaled_dot_product_attention(queries.float().view(R, H, 1, E), keys, values)
    torch.testing.assert_close(out.float().view(R, H, 1, E), expected, rtol=1e-2, atol=1e-2)


def test_the_tokens_of_a_step(device):
    """The last row of x lies past 2**31. The head of a step reads it, and the tail of the step writes it."""
    from tarflow_fast.kernels.triton.affine_inverse import affine_inverse
    from tarflow_fast.kernels.triton.step_embed import embed

    B, T, D, C = 3, 2**28, 4, 16
    x, z = (vast(B, T, D, dtype=torch.float32, device=device) for _ in range(2))
    at, place, following = 7, T - 3, T - 9  # two successive tokens, both far from the first in memory
    order = torch.empty(T, dtype=torch.int32, device=device)  # 1 GiB, but only two numbers are used
    order[at], order[at + 1] = place, following
    x[:, place], z[:, following] = torch.randn(2, B, D, device=device)
    weight, bias = torch.randn(C, D, device=device), torch.randn(C, device=device)
    pos, classes = vast(T, C, dtype=torch.float32, device=device), torch.randn(B, C, device=device)
    pos[place] = torch.randn(C, device=device)
    starts = torch.full((2, B), at, dtype=torch.int32, device=device)
    h = torch.empty(B, C, device=device)
    embed(x=x, weight=weight, bias=bias, pos_embed=pos, classes=classes, h=h, starts=starts, order=order, W=1)
    torch.testing.assert_close(h, F.linear(x[:, place], weight, bias) + pos[place] + classes)

    out_weight, out_bias = torch.randn(2 * D, C, device=device) / 8, torch.randn(2 * D, device=device)
    sums, guidance = vast(1, 8, T + 1, dtype=torch.float32, device=device), torch.zeros(2, at + 1, device=device)
    affine_inverse(
        h=h, weight=out_weight, bias=out_bias, z=z, x=x, sums=sums[:, :B, :T], starts=starts, order=order,
        guidance=guidance, W=1, guided=False,
    )  # fmt: skip
    a, b = F.linear(h, out_weight, out_bias).chunk(2, dim=1)
    torch.testing.assert_close(x[:, following], z[:, following] * a.exp() + b, rtol=1e-5, atol=1e-5)


def test_attention_of_rows_far_apart(device):
    """The third row of a batch begins past 2**31, while the stride of a row is below that; both passes work."""
    B, T, H, E = 3, 9, 1, 16
    stride = FAR // 2 + 3 * E
    whole = vast(2 * stride + 3 * T * E, dtype=torch.float16, device=device)
    apart = whole.as_strided((B, T, 3, H, E), (stride, 3 * H * E, H * E, E, 1))
    apart.copy_(torch.randn(B, T, 3, H, E, device=device))
    leaves = [part.detach().requires_grad_() for part in apart.unbind(2)]
    close = [part.detach().clone().requires_grad_() for part in apart.unbind(2)]
    assert {part.stride(0) for part in leaves} == {stride}
    results = []
    for tensors, backend in ((leaves, "triton"), (close, "torch")):
        out = attention(*tensors, backend=backend)
        results.append([out.detach(), *torch.autograd.grad(out.sum(), tensors)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got.float(), expected.float(), rtol=1e-2, atol=1e-2)
