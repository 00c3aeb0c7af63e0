"""The engine's kernels by themselves: products of integers are exact to the last bit, GELU is close to float64."""

import numpy as np
import pytest
import torch

from tarflow_fast import native

PRECISIONS = {"fp32": 0, "bf16": 1, "int8": 2}


def matmul(x, w, bias, precision):
    y = torch.full((x.size(0), w.size(0)), torch.nan)
    pointers = [native.pointer(tensor) for tensor in (x, w, bias, y)]
    sizes = x.size(0), w.size(0), x.size(1)
    native.check(native.library().tf_test_matmul(*pointers, *sizes, PRECISIONS[precision]), "matmul")
    return y


@pytest.mark.every_isa
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("N, K", [(1, 1), (64, 64), (65, 63), (130, 257), (17, 1030)])
def test_products_of_integers_are_exact(N, K, precision):
    """Sums of small integers are exact in any order of summation, so any other bit is a bug."""
    random = torch.Generator().manual_seed(N * K)
    x = torch.randint(-8, 9, (130, K), generator=random).float()
    w = torch.randint(-8, 9, (N, K), generator=random).float()
    bias = torch.randint(-99, 99, (N,), generator=random).float()
    if precision == "int8":
        w[torch.arange(N), torch.arange(N) % K] = 127.0  # so every row's scale is 1
    expected = (x.double() @ w.double().T + bias.double()).float()
    for R in range(1, 131):
        wrong = matmul(x[:R].contiguous(), w, bias, precision) != expected[:R]
        assert not wrong.any(), (
            f"{int(wrong.sum())} of {wrong.numel()} wrong at R = {R}, first {wrong.nonzero()[0].tolist()}"
        )


@pytest.mark.every_isa
def test_int8_weights_are_the_nearest_multiples_of_their_scale():
    w = torch.randn(70, 33) * torch.logspace(-6, 6, 70)[:, None]
    w[3] = 0
    scale = (w.abs().amax(dim=1) / 127).where(w.abs().amax(dim=1) > 0, 1.0)
    stored = matmul(torch.eye(33), w, torch.zeros(70), "int8").T
    expected = (w / scale[:, None]).round() * scale[:, None]
    assert torch.equal(stored, expected)


@pytest.mark.every_isa
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_long_sums_lose_no_more_than_torch(precision):
    x, w = torch.randn(7, 3000), torch.randn(50, 3000)
    if precision == "bf16":  # the inputs are exact in bf16, so only the sums can be off
        x, w = x.bfloat16().float(), w.bfloat16().float()
    truth = x.double() @ w.double().T
    error = (matmul(x, w, torch.zeros(50), precision) - truth).abs().max()
    assert error <= 2 * (x @ w.T - truth).abs().max()


def native_gelu(x):
    y = np.empty_like(x)
    native.library().tf_test_gelu(x.ctypes.data, y.ctypes.data, x.size)
    return y


@pytest.mark.every_isa
def test_gelu_against_float64():
    """The largest errors of GELU stay close to what was measured.

    Measured below x = 4: 1.3e-7. Above 4, half an ulp is more than that. Measured in ulp: 4.0 for x >= -1, 10 for
    x >= -3, and 207 in the tail below.
    """
    random = np.random.default_rng(0)
    near_zero = random.normal(size=300_000) * 10.0 ** random.uniform(-12, 0, 300_000)
    x = np.concatenate([np.linspace(-13, 9, 1_000_003), near_zero]).astype(np.float32)
    exact = torch.from_numpy(x).double()
    truth = (exact * 0.5 * torch.special.erfc(-exact * 0.5**0.5)).numpy()
    error = np.abs(native_gelu(x) - truth)
    ulp = np.spacing(np.maximum(np.abs(truth), 2.0**-126).astype(np.float32)).astype(np.float64)
    assert error[x < 4].max() <= 2e-7 and (error / ulp)[x >= 4].max() <= 0.6
    for least, most in ((-1, 5), (-3, 12), (-13, 256)):
        assert (error / ulp)[x >= least].max() <= most, least


@pytest.mark.every_isa
def test_gelu_of_special_numbers():
    x = np.array([0.0, -0.0, np.inf, np.nan, -np.nan, 1e38, -1e38, -20.0, 1e-45, 1e-38], np.float32)
    expected = np.array([0, 0, np.inf, np.nan, np.nan, 1e38, 0, 0, 0, 5e-39], np.float32)
    for n in range(1, x.size + 1):
        np.testing.assert_allclose(native_gelu(x[:n].copy()), expected[:n], rtol=1e-6, atol=2e-45)
