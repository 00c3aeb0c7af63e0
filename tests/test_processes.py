"""Runs marked tests again in other processes: with each instruction set of this machine, and in Triton's interpreter.

A process chooses both only once, so a test that depends on them cannot change them while it runs.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tarflow_fast import native

TESTS = Path(__file__).parent
BEST = native.isa()


def marked(marker):
    return [path.name for path in sorted(TESTS.glob("test_*.py")) if f"mark.{marker}\n" in path.read_text()]


def run_marked(marker, names, **environment):
    files = [str(TESTS / name) for name in names]
    command = [sys.executable, "-m", "pytest", "-q", "-m", marker, "-p", "no:xdist", "-p", "no:cacheprovider", *files]
    done = subprocess.run(
        command,
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())} | environment,
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.skipif(BEST is None, reason=native.reason())
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512bf16"])
def test_every_isa(isa):
    built = native.isas()
    if isa not in built:
        pytest.skip(f"this library has no {isa}")
    if built.index(isa) > built.index(BEST):
        pytest.skip(f"this machine cannot run {isa}")
    if isa == BEST:
        pytest.skip(f"all other tests use {isa}")
    run_marked("every_isa", marked("every_isa"), TARFLOW_CPU_ISA=isa)


INTERPRETED = marked("interpreter")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("names", [INTERPRETED[i : i + 3] for i in range(0, len(INTERPRETED), 3)], ids="+".join)
def test_interpreter(names):
    """Three files a process, which takes three seconds of a processor to begin."""
    run_marked("interpreter", names, TRITON_INTERPRET="1")
