"""Each kernel of a sampling step is compared with float64 by the error rule, in Triton's interpreter or on a GPU.

`plain` is PyTorch's result under autocast: the residual stream is float32, and products are in the storage type.
"""

import math

import pytest
import torch
from compare import Judged, assert_accurate, same_bits
from torch.nn import functional as F

from tarflow_fast.ops.registry import triton_missing, triton_refuses

pytest.importorskip("triton")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
STARTS = {3: [0, 4, 8], 2: [8, 3], 1: [6]}  # {rows: their positions}, without the last of T = 10 tokens
ORDERS = {"identity": list(range(10)), "flip": list(range(9, -1, -1)), "any": [3, 9, 0, 6, 1, 8, 5, 2, 7, 4]}


@pytest.fixture(params=DTYPES, ids=["fp32", "fp16", "bf16"])
def dtype(request, device):
    if why_not := triton_refuses(device, request.param) or triton_missing():
        pytest.skip(why_not)
    return request.param


def draw(*shape, device, dtype=torch.float32, scale=1.0):
    return (scale * torch.randn(shape)).to(dtype).to(device)


def scratch_for(R, W, C, hidden, H, T, E, dtype, device):
    from tarflow_fast.kernels.triton import tuning_step

    kinds = {"fp32": torch.float32, "int32": torch.int32, "storage": dtype}
    sizes = tuning_step.scratch(R=R, W=W, C=C, hidden=hidden, H=H, T=T, E=E, dtype=dtype)
    return {name: torch.zeros(size, dtype=kinds[kind], device=device) for name, (size, kind) in sizes.items()}


def positions(starts, W):
    """Positions of the queries (R W,), in the order of the kernels."""
    return (starts[:, None] + torch.arange(W, device=starts.device)).flatten()


def product(x, weight, bias, dtype):
    """F.linear as autocast runs it, with all tensors cast to dtype. The truth takes float64."""
    return F.linear(x.to(dtype), weight.to(dtype), bias.to(dtype))


# ---- head ----------------------------------------------------------------------------------------------------------


@pytest.mark.interpreter
@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("R, W, C, D", [(1, 1, 48, 3), (3, 4, 16, 12), (2, 1, 64, 80)])
def test_embed(R, W, C, D, name, dtype, device):
    from tarflow_fast.kernels.triton.step_embed import embed

    T, B = 10, (R + 1) // 2
    x, weight, bias = draw(B, T, D, device=device), draw(C, D, device=device, dtype=dtype), draw(C, device=device)
    pos, classes = draw(T, C, device=device), draw(R, C, device=device)
    now = torch.tensor(STARTS[R], dtype=torch.int32, device=device)
    starts = torch.stack([torch.full_like(now, 77), now])
    h = torch.full((R * W, C), torch.nan, device=device)
    order = torch.tensor(ORDERS[name], dtype=torch.int32, device=device)
    embed(x=x, weight=weight, bias=bias, pos_embed=pos, classes=classes, h=h, starts=starts, order=order, W=W)
    assert torch.equal(starts[0], now), "the step must begin where the one before it ended"
    p = positions(now, W)
    rows, place = torch.arange(R * W, device=device) // W, order[p.clamp(max=T - 1)]

    def expected(kind, wide):
        tokens = x.to(wide)[rows % B, place]
        out = product(tokens, weight, bias, kind).to(wide) + pos.to(wide)[place] + classes.to(wide)[rows]
        return torch.where((p < T - 1)[:, None], out, 0.0)

    assert_accurate("h", h.cpu(), expected(torch.float64, torch.float64).cpu(), expected(dtype, torch.float32).cpu())


# ---- linear layers -------------------------------------------------------------------------------------------------

LAYERS = [(1, 32, 48), (5, 256, 16), (18, 64, 96), (33, 64, 64)]  # (M, K, N); programs split the sum over K = 256


def layer(M, K, N, dtype, device):
    weight, bias = draw(N, K, device=device, dtype=dtype, scale=K**-0.5), draw(N, device=device)
    scratch = scratch_for(M, 1, N, K, 1, 10, 16, dtype, device)
    scratch["partials"] = torch.full(
        (8 * M * max(3 * K, N),), torch.nan, device=device
    )  # a kernel that reads an old partial sum gets NaN
    scratch["normalized"] = torch.zeros(M, K, dtype=dtype, device=device)
    scratch["counters"] = torch.zeros(256, dtype=torch.int32, device=device)
    return weight, bias, scratch


@pytest.mark.interpreter
@pytest.mark.parametrize("M, K, N", LAYERS)
def test_residual(M, K, N, dtype, device):
    from tarflow_fast.kernels.triton.step_linear import linear

    weight, bias, scratch = layer(M, K, N, dtype, device)
    x, h = draw(M, K, device=device, dtype=dtype), draw(M, N, device=device)
    got = h.clone()
    linear(x, weight, bias, out=got, scratch=scratch, epilogue="residual")
    assert not scratch["counters"].any(), "counters must be left at zero for the next launch"
    truth, plain = (h + product(x, weight, bias, kind) for kind in (torch.float64, dtype))
    assert_accurate("h", got.cpu(), truth.cpu(), plain.float().cpu())


@pytest.mark.interpreter
@pytest.mark.parametrize("M, K, N", LAYERS)
def test_gelu(M, K, N, dtype, device):
    from tarflow_fast.kernels.triton.step_linear import Norm, linear

    weight, bias, scratch = layer(M, K, N, dtype, device)
    h, gain, shift = 30 + 3 * draw(M, K, device=device), 1 + draw(K, device=device, scale=0.2), draw(K, device=device)
    got = torch.full((M, N), torch.nan, dtype=dtype, device=device)
    linear(h, weight, bias, out=got, scratch=scratch, epilogue="gelu", norm=Norm(gain, shift, 1e-5))

    def expected(kind, wide):
        normal = F.layer_norm(h.to(wide), (K,), gain.to(wide), shift.to(wide))
        return F.gelu(product(normal, weight, bias, kind))

    assert_accurate(
        "activations", got.cpu(), expected(torch.float64, torch.float64).cpu(), expected(dtype, torch.float32).cpu()
    )


@pytest.mark.interpreter
@pytest.mark.parametrize("R, W", [(3, 1), (2, 3), (1, 35)])
def test_append(R, W, dtype, device):
    from tarflow_fast.kernels.triton.step_linear import Append, Norm, linear

    H, E, T = 3, 16, 10
    C, M = H * E, R * W
    weight, bias, scratch = layer(M, C, 3 * C, dtype, device)
    h, gain, shift = draw(M, C, device=device), draw(C, device=device), draw(C, device=device)
    starts = torch.tensor([STARTS[R], [99] * R], dtype=torch.int32, device=device)
    cache = torch.full((2, R, H, T, E), -7.0, dtype=dtype, device=device)
    queries = torch.full((M, C), torch.nan, dtype=dtype, device=device)
    linear(
        h, weight, bias, out=queries, scratch=scratch, epilogue="append", norm=Norm(gain, shift, 1e-5),
        append=Append(cache, starts, W),
    )  # fmt: skip

    def expected(kind, wide):
        normal = F.layer_norm(h.to(wide), (C,), gain.to(wide), shift.to(wide))
        qkv = product(normal, weight, bias, kind).view(R, W, 3, H, E).permute(2, 0, 3, 1, 4)
        pair = torch.full((2, R, H, T, E), -7.0, dtype=kind, device=device)
        for r, start in enumerate(STARTS[R]):
            # Nothing is written past the cache, nor for the last token, whose output nothing needs.
            end = min(start + W, T - 1)
            pair[:, r, :, start:end] = qkv[1:, r, :, : end - start]
        return qkv[0].transpose(1, 2).reshape(M, C), pair

    truth, plain = expected(torch.float64, torch.float64), expected(dtype, torch.float32)
    assert_accurate("queries", queries.cpu(), truth[0].cpu(), plain[0].cpu())
    assert_accurate("cache", cache.cpu(), truth[1].cpu(), plain[1].cpu())


# ---- attention -----------------------------------------------------------------------------------------------------


@pytest.mark.interpreter
@pytest.mark.parametrize("R, W, H, E, T, starts", [
    (1, 1, 1, 64, 10, [0]),
    (3, 1, 2, 16, 300, [5, 64, 298]),  # the keys are split, and some parts are empty
    (2, 3, 2, 32, 200, [0, 130]),
    (1, 20, 1, 16, 100, [85]),  # the window reaches past the end
])  # fmt: skip
def test_cached_attention(R, W, H, E, T, starts, dtype, device):
    from tarflow_fast.kernels.triton.cached_attention import cached_attention

    M, C = R * W, H * E
    q, cache = draw(M, C, device=device, dtype=dtype), draw(2, R, H, T, E, device=device, dtype=dtype)
    scratch = scratch_for(R, W, C, 4 * C, H, T, E, dtype, device)
    scratch["partials"].fill_(torch.nan)
    scratch["sums"].fill_(torch.nan)
    places = torch.tensor([starts, [0] * R], dtype=torch.int32, device=device)
    p = positions(places[0], W)
    for r, start in enumerate(starts):
        cache[:, r, :, min(start + W, T - 1) :] = torch.nan  # later places may hold anything
    temperature = torch.linspace(0.5, 2, R, device=device)
    got = torch.full((M, C), torch.nan, dtype=dtype, device=device)
    scale = (math.log2(math.e) * E**-0.5) / temperature
    for _ in range(2):  # the first launch must leave counters that suit a second one
        cached_attention(q, cache, scale=scale, starts=places, out=got, scratch=scratch, W=W)
    assert not scratch["counters"].any()

    def expected(kind):
        out = torch.full((M, C), torch.nan, dtype=kind, device=device)
        for m in range(M):
            if p[m] < T - 1:
                keys, values = (part[m // W, :, : p[m] + 1].to(kind) for part in cache)
                query = q[m].view(H, 1, E).to(kind) / temperature[m // W].to(kind)
                out[m] = F.scaled_dot_product_attention(query, keys, values).flatten()
        return out

    live = (p < T - 1).cpu()
    truth, plain = expected(torch.float64).cpu()[live], expected(dtype).cpu()[live]
    assert_accurate("attention", got.cpu()[live], truth, plain)


@pytest.mark.interpreter
def test_a_machine_filled_by_rows_splits_nothing(device, monkeypatch):
    """Sums are not split when the rows fill the machine, and the results agree with split sums."""
    from tarflow_fast.kernels.triton import tuning_step
    from tarflow_fast.kernels.triton.cached_attention import cached_attention

    if why_not := triton_refuses(device, torch.float32) or triton_missing():
        pytest.skip(why_not)
    R, H, E, T = 2, 1, 16, 150
    q, cache = draw(R, H * E, device=device), draw(2, R, H, T, E, device=device)
    starts, scale = torch.tensor([[100, 3], [0] * 2], dtype=torch.int32, device=device), torch.ones(R, device=device)
    scratch, results = scratch_for(R, 1, H * E, 64, H, T, E, q.dtype, device), []
    for programs, splits in ((132, 3), (2, 1)):
        monkeypatch.setattr(tuning_step, "PROGRAMS", programs)
        assert tuning_step.attention(R=R, W=1, H=H, T=T, dtype=q.dtype)["SPLITS"] == splits
        results.append(torch.empty_like(q))
        cached_attention(q, cache, scale=scale, starts=starts, out=results[-1], scratch=scratch, W=1)
    torch.testing.assert_close(*results)


@pytest.mark.interpreter
def test_cached_attention_does_not_depend_on_other_rows(device):
    from tarflow_fast.kernels.triton.cached_attention import cached_attention

    if why_not := triton_refuses(device, torch.float32) or triton_missing():
        pytest.skip(why_not)
    R, H, E, T = 3, 2, 16, 150
    q, cache = draw(R, H * E, device=device), draw(2, R, H, T, E, device=device)
    starts = torch.tensor([[100, 3, 140], [0] * 3], dtype=torch.int32, device=device)
    scratch, scale = scratch_for(R, 1, H * E, 64, H, T, E, q.dtype, device), torch.full((R,), 0.3, device=device)

    def run(rows):
        out = torch.empty_like(q)
        its_cache, its_starts = cache[:, rows].contiguous(), starts[:, rows].contiguous()
        cached_attention(q[rows], its_cache, scale=scale, starts=its_starts, out=out, scratch=scratch, W=1)
        return out

    straight = run([0, 1, 2])
    cache[:, 1] = torch.nan
    assert same_bits(run([2, 1, 0])[[2, 0]], straight[[0, 2]])


# ---- tail ----------------------------------------------------------------------------------------------------------


@pytest.mark.interpreter
@pytest.mark.parametrize("B, W, C, D, scale, guided, name", [
    (1, 1, 16, 3, True, False, "identity"),
    (3, 1, 64, 12, True, True, "flip"),
    (2, 4, 32, 20, True, True, "any"),
    (2, 3, 32, 5, False, True, "flip"),
    (3, 1, 32, 16, False, False, "any"),
])  # fmt: skip
def test_affine_inverse(B, W, C, D, scale, guided, name, dtype, device):
    judged = Judged()
    for _ in range(judged.draws(B)):  # a sum of log-scales is one number per row
        solve(judged, B, W, C, D, scale, guided, name, dtype, device)
    judged.check()


def solve(judged, B, W, C, D, scale, guided, name, dtype, device):
    """Computes one draw of test_affine_inverse."""
    from tarflow_fast.kernels.triton import tuning_step
    from tarflow_fast.kernels.triton.affine_inverse import affine_inverse

    T, R = 10, B * (1 + guided)
    h = draw(R * W, C, device=device, scale=0.3)
    weight = draw(D * (1 + scale), C, device=device, dtype=dtype, scale=C**-0.5)
    bias, z = draw(D * (1 + scale), device=device, scale=0.3), draw(B, T, D, device=device)
    x, sums = draw(B, T, D, device=device), torch.zeros(tuning_step.tail_tiles(C, D, dtype), B, T, device=device)
    now = torch.tensor(STARTS[B] * (1 + guided), dtype=torch.int32, device=device)
    starts = torch.stack([now, torch.full_like(now, 77)])
    table = torch.rand(2, T).to(device)
    table[0, 4] = 0.0  # there a is not guided, whatever the unguided pass gives
    got = x.clone()
    order = torch.tensor(ORDERS[name], dtype=torch.int32, device=device)
    affine_inverse(
        h=h, weight=weight, bias=bias, z=z, x=got, sums=sums, starts=starts, order=order, guidance=table, W=W,
        guided=guided,
    )  # fmt: skip
    assert torch.equal(starts[1], now + (W == 1)) and torch.equal(starts[0], now)

    def expected(kind, wide):
        solved, total = x.to(wide), torch.zeros(B, T, dtype=wide, device=device)
        ab = product(h, weight, bias, kind).to(wide).view(R, W, -1)
        a, b = ab.chunk(2, dim=-1) if scale else (torch.zeros_like(ab), ab)
        for r in range(B):
            for w in range(W):
                p = STARTS[B][r] + w
                if p >= T - 1:
                    continue
                ga, gb = table[:, p].to(wide) if guided else (0.0, 0.0)
                u = r + B if guided else r
                its_a, its_b = a[r, w] + ga * (a[r, w] - a[u, w]), b[r, w] + gb * (b[r, w] - b[u, w])
                place = ORDERS[name][p + 1]
                solved[r, place] = z[r, place].to(wide) * its_a.exp() + its_b
                total[r, p] = its_a.sum()
        return solved, total

    truth, plain = expected(torch.float64, torch.float64), expected(dtype, torch.float32)
    judged.add("x", got, truth[0].cpu(), plain[0])
    judged.add("sums", sums.sum(0), truth[1].cpu(), plain[1])
