"""How much memory an inverse adds to the process at its peak: the reference and ours, each in a fresh process.

stated    the bytes of plan and workspace, which are known before they are allocated
grown     how much larger the process's resident memory was at its peak than before the call
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

CASES = [("cifar", 16), ("c768_t64", 16), ("imagenet64", 1), ("imagenet64", 4)]
VARIANTS = ("reference", "fp32", "bf16", "int8")
CODE = """
import json, sys
import torch
from workloads import WORKLOADS, build, inputs
from tarflow_fast.transforms import Guidance
from tarflow_fast.engines.cpu import Engine

def status(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))

workload, variant, B = WORKLOADS[sys.argv[1]], sys.argv[2], int(sys.argv[3])
model, reference = build(workload)
noise, labels, _ = inputs(workload, B, False)
warm, _ = build(WORKLOADS["digits"])
warm.sample(1)  # libraries, thread pools
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
with torch.no_grad():
    if variant == "reference":
        reference.blocks[0].reverse(noise, labels)
        stated = 0
    else:
        engine = Engine(variant)
        engine.invert(model.blocks[0], noise, labels, Guidance())
        stated = engine._plan.bytes + engine._workspace.bytes
print(json.dumps({"stated": stated, "grown": status("VmHWM") - before}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-B{case[1]}")
def test_memory(case, full, table, benchmark):
    name, B = case
    if name == "imagenet64" and not full:
        pytest.skip("--full")
    row = {"workload": name, "B": B}

    def run():
        for variant in VARIANTS:
            command = [sys.executable, "-c", CODE, name, variant, str(B)]
            done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            found = json.loads(done.stdout)
            row[f"{variant} grown MB"] = f"{found['grown'] / 1e6:.1f}"
            if variant != "reference":
                row[f"{variant} stated MB"] = f"{found['stated'] / 1e6:.1f}"
                assert 0.9 < found["grown"] / found["stated"] < 1.1, (variant, found)

    benchmark.pedantic(run, rounds=1, iterations=1)
    table("memory", row)
