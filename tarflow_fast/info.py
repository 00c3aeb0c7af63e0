"""What this installation consists of and what of it works here: versions, processor, GPU, native library, backends."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import TYPE_CHECKING, Any

import torch

from tarflow_fast import __version__, native
from tarflow_fast.engines.call import Call
from tarflow_fast.engines.fused import fused_wanted, takes_fused_layer, why_not_fused
from tarflow_fast.engines.table import TABLE, find_path
from tarflow_fast.net import AttentionBlock
from tarflow_fast.ops import explain
from tarflow_fast.ops.registry import OPS

if TYPE_CHECKING:
    from tarflow_fast.block import MetaBlock
    from tarflow_fast.model import TarFlow

__all__ = ["blocks", "format_blocks", "format_info", "info"]

PACKAGES = ("torch", "triton", "numpy", "safetensors")
FEATURES = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx512_bf16",
    "amx_bf16",
    "asimd",
    "bf16",
    "sve",
)
VARIABLES = ("TARFLOW_FAST_BACKEND", "TARFLOW_CPU_ISA", "TRITON_INTERPRET", "OMP_NUM_THREADS")


def info() -> dict[str, Any]:
    """Everything as plain JSON-able values; never raises because something is missing."""
    report = native.build_report()
    return {
        "versions": {
            "tarflow_fast": __version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in PACKAGES},
            "platform": platform.platform(),
        },
        "cpu": {
            "model": native.cpuinfo("model name") or platform.processor() or platform.machine(),
            "features": [
                name for name in FEATURES if name in (native.cpuinfo("flags") or native.cpuinfo("Features")).split()
            ],
            "cores": os.cpu_count(),
            "threads": native.threads(),
        },
        "gpus": _gpus(),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "native": {
            "available": native.available(),
            "reason": native.reason(),
            "isa": native.isa(),
            "isas": native.isas(),
            "build": report,
        },
        "ops": explain(),
    }


def format_info() -> str:
    """`info()` as text for a terminal."""
    facts = info()
    versions, cpu, library, build = facts["versions"], facts["cpu"], facts["native"], facts["native"]["build"]
    lines = ["tarflow_fast " + versions["tarflow_fast"]]
    lines += [f"  {name:<12} {versions[name] or 'not installed'}" for name in ("python", *PACKAGES, "platform")]
    lines += ["", "CPU", f"  {cpu['model']}, {cpu['cores']} cores, {cpu['threads']} threads in use"]
    lines += ["  " + (" ".join(cpu["features"]) or "no features of interest found")]
    lines += ["", "GPU", *(f"  {gpu}" for gpu in facts["gpus"] or ["none"])]
    if facts["environment"]:
        lines += ["", "Environment", *(f"  {name}={value}" for name, value in facts["environment"].items())]
    lines += ["", "Native CPU library"]
    if library["available"]:
        lines += [f"  in use: {library['isa']} (built: {', '.join(library['isas'])})"]
    else:
        lines += _indented(f"NOT available: {library['reason']}")
    if build:
        lines += [f"  compiler: {build.get('compiler_version') or build.get('compiler') or 'none'}"]
        lines += [f"  flags: {build['flags']}"] if "flags" in build else []
        lines += [] if build.get("openmp", True) else ["  built without OpenMP: one thread only"]
        for name, why in build.get("isas_left_out", {}).items():
            lines += [f"  without {name}: {why.splitlines()[-1]}"]
    lines += ["", "Ops"]
    for row in facts["ops"]:
        lines += [
            f"  {row['op']:<14} {row['backend']:<8} {'yes' if row['available'] else 'no: ' + _first(row['reason'])}"
        ]
    return "\n".join(lines)


def blocks(model: TarFlow) -> list[dict[str, Any]]:
    """Which path each flow block takes on this machine, and why not a faster one; JSON-able, one row a block:

    {"block": its number, "inverse": "cpu", "triton", "torch" or "none", "inverse_reason": "" or why no faster one,
     "layers": "fused", "modules" or "none", of the forward pass, "layers_reason": likewise}

    A block is left to PyTorch for hooks, adapters, parametrizations, quantized and replaced layers. "none": the
    backend asked for by name cannot run, and the call raises.
    """
    rows = []
    for number, block in enumerate(model.blocks):
        row = {"block": number}
        row["inverse"], row["inverse_reason"] = _inverse(model, block)
        row["layers"], row["layers_reason"] = _layers(model, block)
        rows.append(row)
    return rows


def format_blocks(model: TarFlow) -> str:
    """`blocks(model)` as text for a terminal."""
    lines = [f"Blocks of the flow ({model.var.device}, {str(model.var.dtype).removeprefix('torch.')})"]
    for row in blocks(model):
        lines += [f"  {row['block']:<3} inverse: {row['inverse']}{_why(row['inverse_reason'])}"]
        lines += [f"      layers:  {row['layers']}{_why(row['layers_reason'])}"]
    return "\n".join(lines)


def _inverse(model: TarFlow, block: MetaBlock) -> tuple[str, str]:
    try:
        path = find_path(block.bijection, model.var[None], Call(model.backend, frozen=model._frozen))
    except RuntimeError as error:
        return "none", str(error)
    device = model.var.device
    preferred = TABLE.auto.get(device.type, ("torch",))[0]
    return path.engine, path.reason or TABLE.why_not(preferred, device, model.var.dtype)


def _layers(model: TarFlow, block: MetaBlock) -> tuple[str, str]:
    h = model.var.new_empty(1, 1, model.channels)
    if not fused_wanted(h, model.backend):
        return "modules", f"not wanted for backend {model.backend!r} on {h.device.type} tensors"
    for number, layer in enumerate(block.attn_blocks):
        reason = why_not_fused(layer) if type(layer) is AttentionBlock else f"is a {type(layer).__name__}"
        if not reason and not takes_fused_layer(layer, h, model.backend):
            reason = "has parameters of other dtypes"
        if reason:
            return "modules", f"attn_blocks.{number}: {reason}"
    reason = OPS["attention"].why_not("triton", h.device, h.dtype)
    return ("none", reason) if reason else ("fused", "")


def _why(reason: str) -> str:
    return f" ({_first(reason)})" if reason else ""


def _first(text: str) -> str:
    return text.splitlines()[0]


def _indented(text: str) -> list[str]:
    return ["  " + line for line in text.splitlines()]


def _version(package: str) -> str | None:
    if package == "torch":  # the one that tells the builds of a version apart: metadata may say 2.11.0 of 2.11.0+cu130
        return str(torch.__version__)
    # Asked of the package's metadata: importing triton only to name its version takes a second.
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor}" for gpu in found]
