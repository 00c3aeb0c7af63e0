"""Compiled kernels carried to a GPU: Triton's cache, filled without a GPU, in one archive.

A kernel is found again where the same Triton (libtriton.so and all its files, so the same Python too) reads the same
source. stamp.json in the archive says which Triton it was; another one takes nothing of it. Triton writes the folder
of the cache into it, so the paths in the archive are made those of the folder that it is unpacked to.
"""

import contextlib
import dataclasses
import io
import json
import os
import platform
import sys
import tarfile
import tempfile
from pathlib import Path

STAMP = "stamp.json"


def stamp():
    """What must be the same where a cache is filled and where it is used."""
    import triton
    from triton.runtime.cache import triton_key

    return {"python": platform.python_version_tuple()[:2], "triton": triton.__version__, "key": triton_key()}


def fill(archive, arch, works=None):
    """Compiles what the plan of bench/gpu.py launches on a GPU of this architecture (80 or 90), into the archive."""
    import gpu_bare

    sys.path.insert(0, str(gpu_bare.ROOT / "tests" / "gpu"))
    from null_driver import null_device

    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        os.environ.pop("TRITON_INTERPRET", None)
        with null_device(arch) as device, contextlib.redirect_stdout(io.StringIO()):
            for work in works or WORKS:
                work()
        pack(folder, archive)
    print(f"{len(device.compiled)} kernels for sm_{arch} in {archive}, {os.path.getsize(archive) / 1e6:.1f} MB")
    return 0


def pack(folder, archive):
    """Writes the archive of a cache: for each kernel what the launch needs, and not the steps of its compilation."""
    folder, told = Path(folder), json.dumps(stamp()).encode()
    with tarfile.open(f"{archive}.part", "w:gz") as file:
        head = tarfile.TarInfo(STAMP)
        head.size = len(told)
        file.addfile(head, io.BytesIO(told))
        for path in sorted(path for path in folder.rglob("*") if path.suffix in (".json", ".cubin", ".ptx")):
            file.add(path, path.relative_to(folder))
    os.replace(f"{archive}.part", archive)


def unpack(archive, folder):
    """Unpacks an archive of this Triton into the folder of a cache, and says in a sentence what was done."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as file:
        theirs, ours = json.load(file.extractfile(STAMP)), json.loads(json.dumps(stamp()))
        differ = [name for name in ours if theirs.get(name) != ours[name]]
        if differ:
            shown = ", ".join(
                f"{name} {str(theirs.get(name))[:40]} there, {str(ours[name])[:40]} here" for name in differ
            )
            return f"{archive} was not taken, so kernels are compiled here: {shown}"
        file.extractall(folder, filter="data")
    (folder / STAMP).unlink()
    groups = [*folder.rglob("__grp__*.json")]
    for path in groups:
        group = json.loads(path.read_text())
        names = {name: path.parent / Path(old).name for name, old in group["child_paths"].items()}
        group["child_paths"] = {name: str(new) for name, new in names.items() if new.exists()}
        path.write_text(json.dumps(group))
    return f"{len(groups)} kernels of {archive} were unpacked"


# ---- what is compiled ------------------------------------------------------------------------------------------------


class Nothing:
    """A record that keeps nothing: nothing is computed, so no number and no check means anything."""

    piece, peaks, rows = "", {"bytes": 1.0, "flops": 1.0}, []

    def check(self, *_, **__):
        pass

    skip = row = check


def samples():
    """Whole samples and blocks of the published flows: one layer launches the kernels of all."""
    import torch
    from gpu_inverse import whole_sample
    from gpu_plan import MODELS
    from gpu_timer import Timer
    from workloads import WORKLOADS

    for model in MODELS:
        kept = WORKLOADS[model]
        for B, guided in [(B, guided) for B in (1, 4, 16, 40, 64, 128) for guided in (False, True)]:
            # The checks are of 256 tokens, and Triton tells only multiples of 16 apart; the tiles are of T.
            side = 16 * kept.patch_size if B == 40 else kept.img_size
            WORKLOADS[model] = dataclasses.replace(kept, layers_per_block=1, img_size=side)
            try:
                with null_blocks(1):
                    whole_sample(model, Timer("cpu"), Nothing(), torch.bfloat16, B, guided)
            finally:
                WORKLOADS[model] = kept


@contextlib.contextmanager
def null_blocks(count):
    import gpu_inverse

    before, gpu_inverse.BLOCKS = gpu_inverse.BLOCKS, count
    try:
        yield
    finally:
        gpu_inverse.BLOCKS = before


def checks():
    """The laws of a whole model and equal bits, in each precision."""
    import gpu_checks
    import torch

    dtypes = [torch.bfloat16, torch.float16, torch.float32]
    gpu_checks.laws(Nothing(), torch.device("cpu"), dtypes)
    for dtype in dtypes[:2]:
        gpu_checks.equal_bits(Nothing(), torch.device("cpu"), dtype, 2)


def sequences():
    """Attention over whole sequences, forward and backward, and the other kernels of training."""
    import torch
    from gpu_kernels import density
    from gpu_timer import Timer

    from tarflow_fast import ops

    for B, T in ((4, 1024), (16, 1024), (64, 256), (8, 2048)):
        tensors = [torch.zeros(B, T, 12, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
        out = ops.attention(*tensors, backend="triton")
        torch.autograd.grad(out, tensors, out.detach())
    density(Timer("cpu"), Nothing(), torch.bfloat16)


def training_step():
    import torch
    from gpu_timer import Timer
    from gpu_training import training
    from workloads import WORKLOADS

    kept = WORKLOADS["imagenet64"]
    WORKLOADS["imagenet64"] = dataclasses.replace(kept, layers_per_block=1)
    try:
        training("imagenet64", Timer("cpu"), Nothing(), torch.bfloat16, 8, ["ours"], backend="triton")
    finally:
        WORKLOADS["imagenet64"] = kept


WORKS = (samples, checks, sequences, training_step)
