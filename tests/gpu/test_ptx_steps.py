"""The tests of the sampling step's kernels (tests/test_step_kernels.py), with the kernels' compiled PTX executed."""

import pytest
import test_step_kernels
import torch
from ptx.kinds import fma32
from test_step_kernels import (  # noqa: F401
    test_a_machine_filled_by_rows_splits_nothing,
    test_affine_inverse,
    test_append,
    test_cached_attention,
    test_cached_attention_does_not_depend_on_other_rows,
    test_embed,
    test_gelu,
    test_residual,
)


@pytest.fixture(autouse=True)
def executed(machine, monkeypatch):
    """It fails where a test launched nothing."""
    for name in ("triton_refuses", "triton_missing"):  # what runs here is no Triton
        monkeypatch.setattr(test_step_kernels, name, lambda *_: None)
    monkeypatch.setattr(test_step_kernels, "product", product)
    yield
    assert machine.executed


def product(x, weight, bias, dtype):
    """F.linear in `dtype`. In float32 it is the sum that a GPU makes: one number after another, from the bias on.

    Triton turns dot(a, b) + bias into dot(a, b, bias) where one tile covers all inputs, as it does at the sizes of
    these tests. Each partial sum is then rounded at the size of the bias, which costs a bit of accuracy.
    """
    if dtype != torch.float32:
        return torch.nn.functional.linear(x.to(dtype), weight.to(dtype), bias.to(dtype))
    x, weight, total = x.numpy(), weight.numpy(), bias.numpy()[None]
    for k in range(x.shape[-1]):
        total = fma32(x[..., k : k + 1], weight[:, k], total)
    return torch.from_numpy(total)
