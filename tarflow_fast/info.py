"""What this installation consists of and what of it works here: versions, processor, GPU, native library, backends."""

import importlib.metadata
import os
import platform
from typing import Any

import torch

from tarflow_fast import __version__, native
from tarflow_fast.ops import explain

__all__ = ["format_info", "info"]

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
            "model": _cpuinfo("model name") or platform.processor() or platform.machine(),
            "features": [name for name in FEATURES if name in (_cpuinfo("flags") or _cpuinfo("Features")).split()],
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
            f"  {row['op']:<12} {row['backend']:<8} {'yes' if row['available'] else 'no: ' + _first(row['reason'])}"
        ]
    return "\n".join(lines)


def _first(text: str) -> str:
    return text.splitlines()[0]


def _indented(text: str) -> list[str]:
    return ["  " + line for line in text.splitlines()]


def _version(package: str) -> str | None:
    # Asked of the package's metadata: importing triton only to name its version takes a second.
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpuinfo(key: str) -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next((line.split(":", 1)[1].strip() for line in file if line.split(":")[0].strip() == key), "")
    except OSError:
        return ""


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor}" for gpu in found]
