"""Compiles the kernels of a sampling step as a launch would, with the same specialization, for a GPU not there."""

import re
import subprocess
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

KINDS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32"}
OPTIONS = ("num_warps", "num_stages")


class Recorder:
    """Stands in for a kernel: launching it notes what would be compiled."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            names = [p.name for p in self.kernel.params]
            given = dict(zip(names, args, strict=False)) | kwargs
            options = {name: given.pop(name) for name in OPTIONS if name in given}
            self.launches.append((self.kernel, grid, given, options))

        return launch


def source_of(kernel, given):
    """The specialization the JIT makes: types, 1 as a constant, pointers and numbers divisible by 16."""
    signature, constants, attrs = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = given[parameter.name]
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            signature[parameter.name], constants[(index,)] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = KINDS[value.dtype]
            attrs[(index,)] = [["tt.divisibility", 16]]  # torch allocates aligned, and a layer of the cache stays so
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0:
                attrs[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32"
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)


def build(kernel, given, options, arch):
    return triton.compile(source_of(kernel, given), target=GPUTarget("cuda", arch, 32), options=dict(options))


def resources(compiled, folder):
    """{"REG": ..., "STACK": ..., "SHARED": ..., "LOCAL": ...} as the assembler reports them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    cubin = Path(folder, "kernel.cubin")
    cubin.write_bytes(compiled.asm["cubin"])
    told = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True)
    return {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", told.stdout + told.stderr)}


def products(compiled):
    """Which matrix instructions the PTX has: any of "wgmma", "mma"."""
    ptx = compiled.asm["ptx"]
    return {name for name, mark in (("wgmma", "wgmma.mma_async"), ("mma", "mma.sync")) if mark in ptx}


def wide_loads(compiled):
    """Bytes of every global load and asynchronous copy."""
    ptx = compiled.asm["ptx"]
    loads = [int(v or 1) * int(b) // 8 for v, b in re.findall(r"ld\.global[\w.:]*?(?:\.v(\d))?\.[bfu](\d+)", ptx)]
    copies = [int(size, 16) for size in re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?, 0x([0-9a-f]+)", ptx)]
    return loads + copies
