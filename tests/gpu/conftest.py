"""Fixtures of the tests that execute compiled PTX."""

import os

import pytest
import torch


@pytest.fixture(scope="session")
def compiled_cache(tmp_path_factory):
    """One folder for what Triton compiles: the tests of this folder share their kernels."""
    return str(tmp_path_factory.mktemp("triton"))


@pytest.fixture
def machine(monkeypatch, compiled_cache):
    """A Machine that every kernel of the project is launched on."""
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET"):
        pytest.skip("the interpreter compiles nothing")
    monkeypatch.setenv("TRITON_CACHE_DIR", os.environ.get("TARFLOW_PTX_CACHE", compiled_cache))
    from ptx.launch import Machine
    from tarflow_fast.kernels.triton import (
        accept,
        affine,
        affine_inverse,
        bias_gelu,
        bias_residual,
        cached_attention,
        columns,
        layer_norm,
        step_embed,
        step_linear,
    )

    made = Machine()
    made.replace(monkeypatch, affine, bias_gelu, bias_residual, columns, layer_norm)
    made.replace(monkeypatch, accept, affine_inverse, cached_attention, step_embed, step_linear)
    return made


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def dtype(request):
    return request.param
