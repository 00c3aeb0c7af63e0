"""The library compiles for baseline 64-bit Arm. This is checked with a cross compiler where one is installed."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMPILER = shutil.which("aarch64-linux-gnu-g++")
SOURCES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("csrc/cpu/**/*.cpp"))


@pytest.mark.skipif(COMPILER is None, reason="no aarch64-linux-gnu-g++ (Debian: g++-aarch64-linux-gnu)")
@pytest.mark.parametrize("source", SOURCES)
def test_compiles_for_aarch64(source):
    flags = "-std=c++17 -O1 -fsyntax-only -fopenmp -ffp-contract=off -fno-exceptions -fno-rtti -DTF_ISA=baseline"
    done = subprocess.run([COMPILER, *flags.split(), source], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
