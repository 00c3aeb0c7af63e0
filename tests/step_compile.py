"""Compiles the kernels of a sampling step without a GPU, with the same specialization as a launch would.

python tests/step_compile.py    prints registers, shared memory and loads of every kernel of the published models
"""

import functools
import itertools
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32"}
OPTIONS = ("num_warps", "num_stages")
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
MODELS = {"imagenet64": (768, 12, 1024), "afhq256": (768, 192, 1024), "imagenet128": (1024, 48, 1024)}  # C, D, T
BATCHES = {1: (1, 3, 4, 8, 16, 32, 40, 64, 128), 16: (1, 16, 128)}  # {window W: batch sizes B}
KERNELS = ("embed", "normalize", "linear", "attention", "tail")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Recorder:
    """Stands in for a kernel. A launch of it only notes what would be compiled."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            names = [p.name for p in self.kernel.params]
            given = dict(zip(names, args, strict=False)) | kwargs
            options = {name: given.pop(name) for name in OPTIONS if name in given}
            self.launches.append((self.kernel, grid, given, options))

        return launch


def launches(model, B, guided, dtype, W=1):
    """The launches of one layer's step of a published model: each different (kernel, grid, arguments, options) once."""
    from tarflow_fast.kernels.triton import affine_inverse, cached_attention, step_embed, step_linear

    from tarflow_fast.block import MetaBlock
    from tarflow_fast.engines.triton_graph import GraphWorkspace
    from tarflow_fast.engines.weights import inspect

    C, D, T = MODELS[model]
    with torch.device("meta"):
        block = MetaBlock(D, C, T, num_layers=1)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        for module in (step_embed, step_linear, cached_attention, affine_inverse):
            for name in [name for name in vars(module) if name.endswith("_kernel")]:
                patch.setattr(module, name, Recorder(getattr(module, name), seen))
        GraphWorkspace(inspect(block), B, guided, dtype, window=W).step()
    return list({same(launch): launch for launch in seen}.values())


def same(launch):
    """The key of a launch. The JIT compiles two launches with the same key once."""
    kernel, _, given, options = launch
    source = source_of(kernel, given)
    parts = (source.signature, source.constants, source.attrs, options)
    return kernel.__name__, *(str(sorted(part.items(), key=str)) for part in parts)


def chosen(found):
    """All of these (model, launch), or without TARFLOW_GPU_PROOF=1 (make gpu-proof) one of each shape of tiles.

    That one is the last, guided and with many rows: fewest of its arguments are constants, so it needs most registers.
    """
    if os.environ.get("TARFLOW_GPU_PROOF"):
        return found
    return list({describe(launch): (model, launch) for model, launch in found}.values())


@functools.cache
def every_launch(dtype):
    """{kernel: [(model, launch)]} with every specialization of the published models, at each batch, guided and not."""
    found, known = {kernel: [] for kernel in KERNELS}, set()
    sizes = [(W, B) for W, batches in BATCHES.items() for B in batches]
    for model, (W, B), guided in itertools.product(MODELS, sizes, (False, True)):
        for launch in launches(model, B, guided, dtype, W):
            if same(launch) not in known:
                known.add(same(launch))
                found[launch[0].__name__.removesuffix("_kernel")].append((model, launch))
    return found


def describe(launch):
    """A launch as one line: "linear append out=64 in=256 M=16 splits=3"."""
    kernel, _, given, _ = launch
    words = [kernel.__name__.removesuffix("_kernel"), str(given.get("EPILOGUE", ""))]
    words += ["norm"] if given.get("NORM") else []
    names = {"BLOCK_OUT": "out", "BLOCK_IN": "in", "BLOCK_M": "M", "BLOCK_W": "W", "BLOCK_T": "T"}
    words += [f"{short}={given[name]}" for name, short in names.items() if name in given]
    return " ".join(filter(None, [*words, f"splits={given['SPLITS']}" if "SPLITS" in given else ""]))


def source_of(kernel, given):
    """The specialization that the JIT makes of the arguments.

    It knows their types, which integers are 1 (these become constants), and which pointers and integers are divisible
    by 16. Other integers and constant strings have an empty attribute, which counts in the hash of the cache alone.
    """
    signature, constants, attrs = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = given[parameter.name]
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            signature[parameter.name], constants[(index,)] = "constexpr", value
            if isinstance(value, str):
                attrs[(index,)] = []
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            attrs[(index,)] = [["tt.divisibility", 16]]  # torch aligns allocations, and layers of the cache too
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if value < 2**31 else "i64"
            attrs[(index,)] = [["tt.divisibility", 16]] if value % 16 == 0 else []
        else:
            signature[parameter.name] = "fp32"
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)


def build(kernel, given, options, arch):
    return triton.compile(source_of(kernel, given), target=GPUTarget("cuda", arch, 32), options=dict(options))


def resources(compiled, folder):
    """The counts {"REG": ..., "STACK": ..., "SHARED": ..., "LOCAL": ...} that the assembler reports."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    cubin = Path(folder, "kernel.cubin")
    cubin.write_bytes(compiled.asm["cubin"])
    told = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True)
    return {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", told.stdout + told.stderr)}


def serialized(compiled, folder, arch):
    """What the assembler says of products that it makes wait for one another, or an empty text.

    Triton does not pass this on. Only asynchronous products (wgmma) can lose by it.
    """
    if "wgmma.mma_async" not in compiled.asm["ptx"]:
        return ""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    ptx = Path(folder, "kernel.ptx")
    ptx.write_text(compiled.asm["ptx"])
    command = [tool, f"--gpu-name=sm_{arch}a", ptx, "-o", Path(folder, "again.cubin")]
    told = subprocess.run(command, capture_output=True, text=True, check=True)
    return "\n".join(line for line in (told.stdout + told.stderr).splitlines() if "serialized" in line)


def pipeline(compiled):
    """(copies before the first wait, groups that this wait leaves under way); (0, None) where nothing waits."""
    ptx = compiled.asm["ptx"]
    wait = re.search(r"cp\.async\.wait_group\s+(\d+)", ptx)
    return (len(re.findall(r"cp\.async\.c[ag]\.", ptx[: wait.start()])), int(wait[1])) if wait else (0, None)


def products(compiled):
    """The set of matrix instructions that the PTX has, out of "wgmma" and "mma"."""
    ptx = compiled.asm["ptx"]
    return {name for name, mark in (("wgmma", "wgmma.mma_async"), ("mma", "mma.sync")) if mark in ptx}


def wide_loads(compiled):
    """A list of the bytes of each global load and each asynchronous copy."""
    ptx = compiled.asm["ptx"]
    loads = [int(v or 1) * int(b) // 8 for v, b in re.findall(r"ld\.global[\w.:]*?(?:\.v(\d))?\.[bfu](\d+)", ptx)]
    return loads + copies(compiled)


def copies(compiled):
    """A list of the bytes of each asynchronous copy."""
    sizes = re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?, 0x([0-9a-f]+)", compiled.asm["ptx"])
    return [int(size, 16) for size in sizes]


def main():
    """Prints the whole table. It takes a few minutes."""
    from tempfile import TemporaryDirectory

    print("sm dtype | model, kernel | registers | shared bytes | spilled bytes | matrix instructions | 16-byte loads")
    for dtype in DTYPES:
        for model, launch in (pair for pairs in every_launch(dtype).values() for pair in pairs):
            for arch in SHARED_LIMIT:
                compiled = build(launch[0], launch[2], launch[3], arch)
                with TemporaryDirectory() as folder:
                    used = resources(compiled, folder)
                sizes, made_of = wide_loads(compiled), "+".join(sorted(products(compiled))) or "-"
                print(
                    f"{arch} {str(dtype).removeprefix('torch.')} | {model} {describe(launch)} | {used['REG']} | "
                    f"{compiled.metadata.shared} | {used['STACK'] + used['LOCAL']} | "
                    f"{made_of} | {sizes.count(16)} of {len(sizes)}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
