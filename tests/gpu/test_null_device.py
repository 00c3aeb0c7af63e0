"""The host path of a GPU on CPU tensors: what it launches, what it would compile, and that Triton's cache keeps all."""

import functools
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from null_driver import cache_hash, null_device
from step_compile import MODELS, SHARED_LIMIT, describe, every_launch, resources, source_of
from test_training_compile import fresh_cache  # noqa: F401

from tarflow_fast import TarFlow

PARTS = {  # {module: kernels of a training step}
    "attention": "forward", "attention_backward": "query key", "layer_norm": "forward backward", "columns": "sum",
    "bias_gelu": "forward backward", "bias_residual": "forward backward", "affine": "forward backward log_det",
}  # fmt: skip
GUIDED = {"guidance": 0.2, "attn_temp": 0.3}
PATCH = {12: 2, 48: 4, 192: 8}  # of a token of three channels


@functools.cache
def flow(model, num_blocks=1, layers_per_block=1):
    """A published flow with fewer blocks and layers, which launches the kernels of a whole one."""
    C, D, T = MODELS[model]
    side = int(T**0.5) * PATCH[D]
    return TarFlow(3, side, PATCH[D], C, num_blocks, layers_per_block, backend="triton").eval()


def hashes_of(launches, arch):
    """{hash: a line} of these launches."""
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", arch, 32)
    return {
        cache_hash(source_of(kernel, given), target, options): describe((kernel, grid, given, options))
        for kernel, grid, given, options in launches
    }


def compiled_by_the_tests(dtype, arch):
    """{hash: a line} of every specialization that tests/test_step_compile.py compiles."""
    return hashes_of([launch for pairs in every_launch(dtype).values() for _, launch in pairs], arch)


@pytest.mark.parametrize(
    "dtype, arch, batches",
    [
        (torch.bfloat16, 90, (1, 3, 8, 16, 40)),
        (torch.bfloat16, 80, (1, 40)),
        (torch.float32, 90, (1, 3, 40)),
    ],
    ids=["bf16-90", "bf16-80", "fp32-90"],
)
def test_the_tests_compile_what_a_sample_launches(dtype, arch, batches):
    """Both have the hashes of Triton's cache, in which every attribute of every argument counts."""
    known, missing = compiled_by_the_tests(dtype, arch), []
    for model, (B, guided) in itertools.product(MODELS, itertools.product(batches, (False, True))):
        with null_device(arch, compiles=False) as device:
            precision = "bf16" if dtype == torch.bfloat16 else "fp32"
            flow(model).sample(B, **GUIDED if guided else {}, precision=precision, nonfinite="ignore")
        assert len(device.compiled) >= 7
        missing += [(model, B, guided, each.kernel) for h, each in device.compiled.items() if h not in known]
    assert not missing


def test_the_tests_compile_what_a_solver_by_windows_launches(monkeypatch):
    """Of passes over windows, tests/test_windows_compile.py compiles what differs, and this test what the others do."""
    import test_windows_compile

    from tarflow_fast.engines.triton_windows import LateCount

    launched = [launch for each in test_windows_compile.launches(torch.bfloat16).values() for launch in each]
    known = hashes_of(launched, 90)
    monkeypatch.setattr(LateCount, "read", lambda *_: 0)  # after the first pass no token is left
    with null_device(compiles=False) as device:
        flow("imagenet64").sample(1, precision="bf16", solver="windows", window=16, tolerance=1e-3, nonfinite="ignore")
    assert {each.kernel for each in device.compiled.values()} >= {"accept_kernel", "attention_kernel", "tail_kernel"}
    assert not [each.kernel for h, each in device.compiled.items() if h not in known]


def test_a_specialization_that_no_test_compiles_is_found():
    """The tests above would fail: no test compiles a batch of 23 rows."""
    known = compiled_by_the_tests(torch.bfloat16, 90)
    with null_device(compiles=False) as device:
        flow("imagenet64").sample(23, precision="bf16", nonfinite="ignore")
    assert {each.kernel for h, each in device.compiled.items() if h not in known} >= {"linear_kernel"}


def test_a_sample_captures_one_step_and_replays_it():
    K, L, T = 3, 2, MODELS["imagenet64"][2]
    with null_device(compiles=False) as device:
        images = flow("imagenet64", K, L).sample(2, precision="bf16", nonfinite="ignore")
    assert images.shape == (2, 3, 64, 64) and images.device.type == "cpu"
    assert device.captures == 1 and device.replays == K * (T - 1)
    # Each kernel is launched to be compiled, and once more to be captured.
    launches = {"embed_kernel": 2, "linear_kernel": 2 * 4 * L, "attention_kernel": 2 * L, "tail_kernel": 2}
    assert device.launches == launches
    with null_device(compiles=False, capture=False) as device:
        flow("imagenet64", 1, L).sample(2, precision="bf16", nonfinite="ignore")
    assert device.launches == {name: count // 2 * (T - 1) for name, count in launches.items()}


def train(model, dtype):
    x = torch.randn(2, 3, model._config.img_size, model._config.img_size)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        z, _, log_dets = model(x)
        loss = model.get_loss(z, log_dets)
    loss.backward()


@pytest.mark.parametrize("arch", SHARED_LIMIT)
def test_a_training_step_compiles(arch, tmp_path):
    """With the attributes of its real arguments no kernel spills.

    tests/test_training_compile.py compiles more shapes, with the attributes that it supposes.
    """
    with null_device(arch) as device:
        train(flow("imagenet64", 2), torch.bfloat16)
    names = {(each.source.fn.__module__.rpartition(".")[2], each.kernel) for each in device.compiled.values()}
    assert names == {(module, f"{part}_kernel") for module, parts in PARTS.items() for part in parts.split()}
    assert not device.found()
    for each in device.compiled.values():
        used = resources(each.result, tmp_path)
        assert not used["LOCAL"] and not used["STACK"], (each.kernel, used)
        assert each.result.metadata.shared <= SHARED_LIMIT[arch]


SECOND = """
import json, sys, torch
sys.path[:0] = {path}
from null_driver import null_device
from test_null_device import flow, train
with null_device({arch}) as device:
    model = flow("afhq256", 1)
    model.sample(16, guidance=0.2, attn_temp=0.5, precision="bf16", nonfinite="ignore")
    train(flow("imagenet64", 1), torch.bfloat16)
print(json.dumps([len(device.compiled), device.found(), sorted(device.compiled)]))
"""


def test_a_second_process_finds_all_that_the_first_compiled(tmp_path):
    tests = Path(__file__).parents[1]
    program = SECOND.format(path=[str(tests / "gpu"), str(tests)], arch=90)
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path / "cache")}

    def told():
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    count, found, hashes = told()
    assert count > 20 and found == 0
    assert told() == [count, count, hashes]
