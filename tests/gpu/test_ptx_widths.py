"""The step's kernels at the widths of the published models, in bf16: every kernel against float64 by the error rule.

C = 768 (12 heads of 64, T = 1024) and C = 1024; one token a pass and sixteen; guided and not. `make gpu-proof` runs
every combination of them.
"""

import os

import pytest
import test_step_kernels as steps
import torch
from compare import assert_accurate
from torch.nn import functional as F

PROOF = bool(os.environ.get("TARFLOW_GPU_PROOF"))
CPU, BF16 = torch.device("cpu"), torch.bfloat16


@pytest.fixture(autouse=True)
def executed(machine):
    yield
    assert machine.executed


@pytest.mark.parametrize("R, W, C, D", [
    (1, 1, 768, 12), (2, 16, 768, 192), (2, 1, 1024, 48),
    *([(2, 1, 768, 192), (1, 16, 768, 12), (2, 16, 1024, 48)] * PROOF),
])  # fmt: skip
def test_embed(R, W, C, D):
    steps.test_embed(R, W, C, D, "any", BF16, CPU)


@pytest.mark.parametrize("M, K, N", [
    (1, 768, 768), (1, 3072, 768), (32, 768, 768), (32, 3072, 768), (2, 4096, 1024),
    *([(1, 1024, 1024), (32, 1024, 1024), (32, 4096, 1024)] * PROOF),
])  # fmt: skip
def test_residual(M, K, N):
    steps.test_residual(M, K, N, BF16, CPU)


@pytest.mark.parametrize("M, K, N", [(1, 768, 3072), (32, 768, 3072), (2, 1024, 4096), *([(32, 1024, 4096)] * PROOF)])
def test_gelu(M, K, N):
    steps.test_gelu(M, K, N, BF16, CPU)


@pytest.mark.parametrize("R, W, C", [(1, 1, 768), (2, 16, 768), (2, 1, 1024), *([(2, 16, 1024)] * PROOF)])
def test_append(R, W, C):
    """Keys and values of C = 64 H numbers, into a cache of 1024 tokens."""
    from tarflow_fast.kernels.triton.step_linear import Append, Norm, linear

    E, T, M, H = 64, 1024, R * W, C // 64
    weight, bias, scratch = steps.layer(M, C, 3 * C, BF16, CPU)
    h, gain, shift = 3 * torch.randn(M, C), torch.randn(C), torch.randn(C)
    first = 1015 if W > 1 else 700  # a window reaches past the end
    starts = torch.tensor([[first] * R, [99] * R], dtype=torch.int32)
    cache, queries = torch.full((2, R, H, T, E), -7.0, dtype=BF16), torch.full((M, C), torch.nan, dtype=BF16)
    linear(
        h, weight, bias, out=queries, scratch=scratch, epilogue="append", norm=Norm(gain, shift, 1e-5),
        append=Append(cache, starts, W),
    )  # fmt: skip
    end = min(first + W, T - 1)

    def expected(kind, wide):
        normal = F.layer_norm(h.to(wide), (C,), gain.to(wide), shift.to(wide))
        qkv = steps.product(normal, weight, bias, kind).view(R, W, 3, H, E).permute(2, 0, 3, 1, 4)
        return qkv[0].transpose(1, 2).reshape(M, C), qkv[1:, :, :, : end - first]

    truth, plain = expected(torch.float64, torch.float64), expected(BF16, torch.float32)
    assert_accurate("queries", queries, truth[0], plain[0])
    assert_accurate("cache", cache[:, :, :, first:end], truth[1], plain[1])
    rest = torch.cat([cache[:, :, :, :first], cache[:, :, :, end:]], 3)
    assert (rest == -7.0).all()


@pytest.mark.parametrize("R, W, H, starts", [
    (1, 1, 12, [700]), (2, 1, 12, [700, 1022]), (1, 16, 12, [700]), (2, 16, 16, [1010, 3]), (2, 1, 16, [0, 511]),
])  # fmt: skip
def test_attention(R, W, H, starts):
    steps.test_cached_attention(R, W, H, 64, 1024, starts, BF16, CPU)


@pytest.mark.parametrize("B, W, C, D, guided", [
    (3, 1, 768, 12, False), (3, 1, 1024, 48, True), (2, 16, 768, 12, True), (3, 1, 768, 192, True),
    *([(3, 1, 768, 12, True), (2, 16, 768, 12, False), (3, 1, 1024, 48, False)] * PROOF),
    *([(2, 16, 1024, 48, guided) for guided in (False, True)] * PROOF),
])  # fmt: skip
def test_tail(B, W, C, D, guided):
    steps.test_affine_inverse(B, W, C, D, True, guided, "any", BF16, CPU)
