"""Whether the kernels are right on this GPU: the project's own tests, the laws of a whole model, and equal bits."""

import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from compare import same_bits
from flows import random_flow, random_images, random_noise, twin

from tarflow_fast import ops
from tarflow_fast.engines.triton import invert_graph
from tarflow_fast.engines.triton_graph import GraphWorkspace
from tarflow_fast.engines.weights import inspect
from tarflow_fast.transforms import Guidance
from tarflow_fast.verify import error_and_bound, run

ROOT = Path(__file__).resolve().parents[1]


def run_tests(record, budget):
    """Runs every test that the interpreter runs on the CPU, in bf16, fp16 and fp32 on the GPU.

    Nearly all of the time is compilation, so the tests are dealt out to as many processes as there are cores.
    """
    files = [path for path in sorted((ROOT / "tests").glob("test_*.py")) if "mark.interpreter\n" in path.read_text()]
    end = time.monotonic() + min(160, budget.left() - 5)
    folders = os.pathsep.join(str(ROOT / name) for name in ("bench", "tests", "."))
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("TRITON_INTERP", "TARFLOW"))}
    environment |= {"PYTHONPATH": folders, "OMP_NUM_THREADS": "1"}

    def pytest(*arguments):
        command = [sys.executable, "-m", "pytest", "-q", "-m", "interpreter", "--device", "cuda", "-p", "gpu_bare"]
        command += ["-p", "no:cacheprovider", "-p", "no:xdist", *arguments]
        try:
            left = max(end - time.monotonic(), 5)
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=left)
        except subprocess.TimeoutExpired as error:
            return None, str(error.stdout or "")
        return done.returncode, done.stdout + done.stderr

    _, listed = pytest("--collect-only", *map(str, files))
    names = [line for line in listed.splitlines() if "::" in line and not line.startswith(("ERROR", "FAILED"))]
    record.check("the tests are found", len(names) > 100, f"{len(names)} of {len(files)} files")
    count = min(14, os.cpu_count() or 1, max(len(names), 1))
    with ThreadPoolExecutor(count) as pool:
        parts = pool.map(lambda number: pytest("-rfE", *names[number::count]), range(count))
        for number, (status, output) in enumerate(parts):
            what = f"the project's tests on the GPU, part {number + 1} of {count}"
            (record.folder / f"tests-{number + 1}.log").write_text(output[-20000:])
            last = output.strip().splitlines()[-1] if output.strip() else "no output"
            if status is None:
                record.check(what, False, "not done in time")
                continue
            failed = " ".join(re.findall(r"^(?:FAILED|ERROR) \S*::(\S+)", output, re.MULTILINE)[:5])
            record.check(what, status == 0 and re.search(r"\d+ passed", last), f"{last} {failed}".strip())


def run_verify(record, device):
    """Holds every op and backend that runs here to float64 (tarflow_fast/verify.py)."""
    rows, _ = run(device)
    for row in rows:
        said = f"worst error {row['worst_error']:.2e}, allowed {row['bound']:.2e}"
        record.check(f"{row['name']} {row['backend']} {row['dtype']}", row["ok"], said)


def attention(bench, T):
    """Holds causal attention of whole sequences, head size 64, and its gradients to float64, beside PyTorch's own."""
    shape = (1, T, 1, 64) if bench.tiny else (4, T, 12, 64)
    drawn = [torch.randn(shape, device=bench.device).to(bench.dtype) for _ in range(4)]

    def evaluated(dtype, backend):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in drawn[:3]]
        out = ops.attention(*leaves, backend=backend)
        return [out.detach(), *torch.autograd.grad(out, leaves, drawn[3].to(dtype))]

    truth, plain, got = (
        evaluated(dtype, backend)
        for dtype, backend in ((torch.float64, "torch"), (bench.dtype, "torch"), (bench.dtype, "triton"))
    )
    name = str(bench.dtype).removeprefix("torch.")
    for what, ours, exact, theirs in zip(("out", "dq", "dk", "dv"), got, truth, plain, strict=True):
        error, bound = error_and_bound(ours, exact, theirs)
        worst = (error / bound).max().item()
        said = f"worst {worst:.2f} of the bound; largest error {error.max().item():.1e}"
        bench.record.check(f"attention T = {T}, {name}: {what} against float64", worst <= 1, said)


def laws(record, device, dtypes, tiny=False):
    """Checks that reverse undoes forward, and that guided images are the reference's by the error rule."""
    config = {"channels": 64 if tiny else 256, "img_size": (2, 4) if tiny else 16, "num_classes": 3, "scale": 0.2}
    config |= {"num_blocks": 1 if tiny else 4, "layers_per_block": 1 if tiny else 2}
    for dtype in dtypes:
        kind, name = torch.device(device).type, str(dtype).removeprefix("torch.")
        model = random_flow(backend="triton", **config).to(device)
        x, y = random_images(model, 8).to(device), torch.arange(8, device=device) % 4 - 1
        with torch.autocast(kind, dtype, enabled=dtype != torch.float32), torch.no_grad():
            z, _, logdets = model(x, y)
            apart = (model.reverse(z / model.var.sqrt(), y) - x).abs().max().item()
            plain = twin(model, torch.float32).to(device)
            its_z, _, _ = plain(x, y)
            theirs = (plain.reverse(its_z / plain.var.sqrt(), y) - x).abs().max().item()
        # Ours rounds at other places than PyTorch does, in both directions. A wrong kernel is off by orders of
        # magnitude.
        allowed = max(8 * theirs, 1e-4)
        finite = bool(logdets.isfinite().all())
        said = f"largest difference {apart:.1e}, plain PyTorch {theirs:.1e}"
        record.check(f"reverse(forward(x)) = x, {name}", apart <= allowed and finite, said)
        noise, arguments = random_noise(model, 8).to(device), {"guidance": 1.0, "attn_temp": 0.8}
        truth = twin(model).to(device).reverse(noise.double(), y, **arguments)
        with torch.autocast(kind, dtype, enabled=dtype != torch.float32):
            plain = twin(model, torch.float32).to(device).reverse(noise, y, **arguments)
            got = model.reverse(noise, y, **arguments)
        error, bound = error_and_bound(got, truth, plain)
        worst = (error / bound).max().item()
        record.check(f"guided images against float64, {name}", worst <= 1, f"worst {worst:.2f} of the bound")


def equal_bits(record, device, dtype, runs, tiny=False):
    """Runs the same inverse again and again. Programs race differently every time, and the bits must not show it.

    The block has the published width, so that linear layers are split over programs, and enough tokens to split
    attention.
    """
    size = {"channels": 64, "img_size": 4} if tiny else {"channels": 768, "img_size": 28, "layers_per_block": 2}
    model = random_flow(**size).to(device)
    block, z = model.blocks[0], random_noise(model, 3).to(device)
    guidance = Guidance(0.0 if tiny else 1.0, attn_temp=0.7)
    workspace = GraphWorkspace(inspect(block), 3, guidance.active, dtype)
    workspace.prepare()
    first, log_det = invert_graph(block.bijection, z, None, guidance, workspace)
    if torch.device(device).type == "cuda":
        record.check(f"a CUDA graph was captured, {dtype}", workspace.graph is not None)
        torch.cuda.set_sync_debug_mode("error")
        try:
            invert_graph(block.bijection, z, None, guidance, workspace)
            record.check(f"the host waits for nothing inside a block, {dtype}", True)
        except RuntimeError as error:
            record.check(f"the host waits for nothing inside a block, {dtype}", False, str(error).splitlines()[0])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    begun, different = time.monotonic(), torch.zeros((), dtype=torch.long, device=device)
    for done in range(1, runs):
        x, its_log_det = invert_graph(block.bijection, z, None, guidance, workspace)
        different += (x.view(torch.int32) != first.view(torch.int32)).any() | (its_log_det != log_det).any()
        if done % 50 == 0 and time.monotonic() - begun > 60:  # the check's name says how many runs there were
            break
    how = "a CUDA graph" if workspace.graph is not None else "no graph"
    record.check(f"equal bits {done + 1} times, {dtype}", int(different) == 0, f"{how}; {int(different)} differ")
    straight = GraphWorkspace(inspect(block), 3, guidance.active, dtype, capture=False)
    x, _ = invert_graph(block.bijection, z, None, guidance, straight)
    record.check(f"the graph's bits are those of its kernels one by one, {dtype}", same_bits(x, first))


SANITIZED = """
import gpu_bare, torch
from flows import random_flow, random_noise
from tarflow_fast.transforms import Guidance
from tarflow_fast.engines.triton import invert_graph
from tarflow_fast.engines.triton_graph import GraphWorkspace
from tarflow_fast.engines.weights import inspect
model = random_flow(channels=64, img_size=4, layers_per_block=1).cuda()
for window in (1, 3):
    workspace = GraphWorkspace(inspect(model.blocks[1]), 2, True, torch.bfloat16, window=window, capture=False)
    x, _ = invert_graph(model.blocks[1].bijection, random_noise(model, 2).cuda(), None, Guidance(1.0), workspace)
    assert x.isfinite().all()
"""


def sanitize(record, seconds):
    """Runs compute-sanitizer over a small inverse, for memory errors and for races in shared memory."""
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if not tool:
        record.skip("compute-sanitizer", "it is not installed")
        return
    environment = os.environ | {"PYTHONPATH": str(ROOT / "bench"), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for kind in ("memcheck", "racecheck"):
        command = [tool, "--tool", kind, "--error-exitcode", "9", sys.executable, "-c", SANITIZED]
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=max(seconds / 2, 5))
        except subprocess.TimeoutExpired:
            record.skip(f"compute-sanitizer {kind}", f"not done after {seconds / 2:.0f} s")
            continue
        (record.folder / f"sanitizer-{kind}.log").write_text((done.stdout + done.stderr)[-20000:])
        last = (done.stdout.strip().splitlines() or ["no output"])[-1]
        record.check(f"compute-sanitizer {kind}", done.returncode == 0, last)
