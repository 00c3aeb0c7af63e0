"""Bits of the sampling step: a row alone has the same bits as among forty rows, in every kernel and in a whole block.

Where tuning_step.py in kernels/triton chooses tiles by the number of rows, these tests ask for the tiles of forty rows.
"""

import math

import pytest
import torch
from compare import same_bits
from test_graph_inverse import GUIDED, make_block, no_grad, noise, triton_device  # noqa: F401
from test_step_kernels import draw, dtype, scratch_for  # noqa: F401

from tarflow_fast.engines.triton import invert_graph
from tarflow_fast.engines.triton_graph import GraphWorkspace
from tarflow_fast.engines.weights import inspect

MANY, T, H, E = 40, 90, 2, 16
C, HIDDEN = H * E, 128
ROW, SLOT = 23, 2  # ROW is tested alone, and among four rows as number SLOT

pytestmark = pytest.mark.interpreter


@pytest.fixture(autouse=True)
def ordered_products(monkeypatch, device):
    """Replaces the interpreter's product by one that always adds up in the same order, as a GPU does.

    The interpreter uses BLAS, whose order of summation depends on the place in a tile.
    """
    if device.type == "cuda":
        return
    from triton.runtime import interpreter

    def dot(self, a, b, d, *options):
        total = d.data.copy()
        for k in range(a.data.shape[1]):
            total += a.data[:, k : k + 1].astype(total.dtype) * b.data[k : k + 1].astype(total.dtype)
        return interpreter.TensorHandle(total, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)


def scratch(rows, dtype, device):  # noqa: F811
    made = scratch_for(rows, 1, C, HIDDEN, H, T, E, dtype, device)
    made["partials"] = torch.full((16 * rows * 3 * HIDDEN,), torch.nan, device=device)
    made["sums"] = torch.full((16 * rows * H * 2,), torch.nan, device=device)
    made["counters"] = torch.zeros(4096, dtype=torch.int32, device=device)
    made["normalized"] = torch.zeros(rows, C, dtype=dtype, device=device)
    return made


def check(run):
    """Checks that ROW has the same bits among all rows, alone, and among three other rows.

    run(rows) computes these rows alone. It gives a list of tensors whose first dimension runs over the rows.
    """
    together = run(list(range(MANY)))
    others = [5, 31, ROW, 8]
    for result, alone, beside in zip(together, run([ROW]), run(others), strict=True):
        assert result.isfinite().all() and same_bits(alone[0], result[ROW]) and same_bits(beside[SLOT], result[ROW])


def test_embed(dtype, device):  # noqa: F811
    """The kernel has fixed tiles, so its sums do not depend on the number of rows."""
    from tarflow_fast.kernels.triton.step_embed import embed

    D = 20
    x, weight, bias = draw(MANY, T, D, device=device), draw(C, D, device=device, dtype=dtype), draw(C, device=device)
    pos, classes = draw(T, C, device=device), draw(MANY, C, device=device)
    starts = torch.arange(MANY, dtype=torch.int32, device=device).repeat(2, 1)
    order = torch.randperm(T).to(device, torch.int32)

    def run(rows):
        h = torch.empty(len(rows), C, device=device)
        embed(
            x=x[rows], weight=weight, bias=bias, pos_embed=pos, classes=classes[rows], h=h,
            starts=starts[:, rows].contiguous(), order=order, W=1,
        )  # fmt: skip
        return [h]

    check(run)


@pytest.mark.parametrize("epilogue", ["append", "gelu", "residual"])
def test_linear(epilogue, dtype, device):  # noqa: F811
    from tarflow_fast.kernels.triton import tuning_step
    from tarflow_fast.kernels.triton.step_linear import Append, Norm, linear

    K, N = {"append": (C, 3 * C), "gelu": (C, HIDDEN), "residual": (HIDDEN, C)}[epilogue]
    norm = epilogue != "residual"
    weight, bias = draw(N, K, device=device, dtype=dtype, scale=K**-0.5), draw(N, device=device)
    gain, shift = draw(K, device=device), draw(K, device=device)
    h = draw(MANY, K, device=device, dtype=torch.float32 if norm else dtype)
    stream, starts = draw(MANY, N, device=device), torch.arange(MANY, dtype=torch.int32, device=device).repeat(2, 1)
    own, theirs = (tuning_step.linear(M=M, outputs=N, inputs=K, dtype=dtype, norm=norm) for M in (1, MANY))
    assert own != theirs and (theirs["SPLITS"] > 1 or K == 32), "otherwise this case shows nothing"

    def run(rows):
        R = len(rows)
        cache = torch.zeros(2, R, H, T, E, dtype=dtype, device=device)
        append = Append(cache, starts[:, rows].contiguous(), 1) if epilogue == "append" else None
        out = stream[rows] if epilogue == "residual" else torch.empty(R, C if append else N, dtype=dtype, device=device)
        normal = Norm(gain, shift, 1e-5) if norm else None
        space = scratch(R, dtype, device)
        linear(
            h[rows], weight, bias, out=out, scratch=space, epilogue=epilogue, norm=normal, append=append,
            tuned_queries=MANY,
        )  # fmt: skip
        return [out, *(part for part in cache if append)]

    check(run)


@pytest.mark.parametrize("epilogue", ["residual", "gelu"])
def test_linear_of_few_queries_has_one_configuration(epilogue, dtype, device):  # noqa: F811
    """Up to 16 queries have the same tiles without being asked for, so their bits are the same too."""
    from tarflow_fast.kernels.triton import tuning_step
    from tarflow_fast.kernels.triton.step_linear import Norm, linear

    normal = Norm(draw(256, device=device), draw(256, device=device), 1e-5) if epilogue == "gelu" else None
    weight, bias = draw(C, 256, device=device, dtype=dtype, scale=1 / 16), draw(C, device=device)
    x, stream = draw(MANY, 256, device=device), draw(MANY, C, device=device)
    x, stream = (x, stream.to(dtype)) if normal else (x.to(dtype), stream)

    def run(rows):
        out = stream[rows].clone()
        space = scratch(len(rows), dtype, device)
        linear(x[rows], weight, bias, out=out, scratch=space, epilogue=epilogue, norm=normal)
        return out

    expected = run([ROW])
    for count in (2, 7, 16):
        assert same_bits(run(list(range(ROW, ROW + count)))[:1], expected)
    for N, K in ((2304, 768), (768, 768), (3072, 768), (768, 3072)):
        tiles = [tuning_step.linear(M=M, outputs=N, inputs=K, dtype=dtype, norm=True) for M in range(1, 17)]
        assert all(each == tiles[0] for each in tiles)


@pytest.mark.parametrize("W", [1, 3])
def test_cached_attention(W, dtype, device):  # noqa: F811
    from tarflow_fast.kernels.triton import tuning_step
    from tarflow_fast.kernels.triton.cached_attention import cached_attention

    heads, tokens = 1, 300  # with one head, forty rows do not fill the machine
    q = draw(MANY, W, heads * E, device=device, dtype=dtype)
    cache = draw(2, MANY, heads, tokens, E, device=device, dtype=dtype)
    starts = (torch.arange(MANY, dtype=torch.int32, device=device) * (tokens // MANY)).repeat(2, 1)
    scale = torch.full((MANY,), math.log2(math.e) / 4, device=device)
    own, theirs = (tuning_step.attention(R=R, W=W, H=heads, T=tokens, dtype=dtype)["SPLITS"] for R in (1, MANY))
    assert own > theirs > 1, "otherwise this case shows nothing"

    def run(rows):
        out = torch.zeros(len(rows) * W, heads * E, dtype=dtype, device=device)
        flat, own_cache = q[rows].flatten(0, 1).contiguous(), cache[:, rows].contiguous()
        space = scratch(len(rows) * W, dtype, device)
        cached_attention(
            flat, own_cache, scale=scale[rows], starts=starts[:, rows].contiguous(), out=out, scratch=space, W=W,
            tuned_rows=MANY,
        )  # fmt: skip
        return [out.view(len(rows), W, heads * E)]

    check(run)


@pytest.mark.parametrize("guided", [False, True])
def test_affine_inverse(guided, dtype, device):  # noqa: F811
    """The sums of this kernel do not depend on the number of rows."""
    from tarflow_fast.kernels.triton import tuning_step
    from tarflow_fast.kernels.triton.affine_inverse import affine_inverse

    D = 20
    h = draw(2, MANY, C, device=device, scale=0.3)
    weight, bias = draw(2 * D, C, device=device, dtype=dtype, scale=C**-0.5), draw(2 * D, device=device)
    z, table = draw(MANY, T, D, device=device), draw(2, T, device=device).abs()
    starts = torch.arange(MANY, dtype=torch.int32, device=device)
    order = torch.randperm(T).to(device, torch.int32)

    def run(rows):
        x, R = z[rows].clone(), len(rows) * (1 + guided)
        sums = torch.zeros(tuning_step.tail_tiles(C, D, dtype), len(rows), T, device=device)
        now = starts[rows].repeat(2, 1 + guided).contiguous()
        passes = h[: 1 + guided, rows].reshape(R, C).contiguous()
        affine_inverse(
            h=passes, weight=weight, bias=bias, z=z[rows], x=x, sums=sums, starts=now, order=order, guidance=table,
            W=1, guided=guided,
        )  # fmt: skip
        return [x, sums.transpose(0, 1)]

    check(run)


def test_a_whole_block(triton_device):  # noqa: F811
    """A row has the same bits among forty rows, alone, and among five rows, always with the tiles of forty rows."""
    block, z = make_block(T=3).to(triton_device), noise(rows=MANY, T=3).to(triton_device)
    together = invert_graph(block.bijection, z, None, GUIDED)
    for rows in ([ROW], [1, 2, ROW, 3, 4]):
        workspace = GraphWorkspace(inspect(block), len(rows), True, torch.float32, batch=MANY)
        workspace.load(block.bijection, inspect(block), z[rows], None, GUIDED)
        workspace.run()
        at = rows.index(ROW)
        assert same_bits(workspace.x[at], together[0][ROW])
        log_det = workspace.sums.sum(dim=(0, 2), dtype=torch.float64).float()
        assert same_bits(log_det[at], together[1][ROW])
