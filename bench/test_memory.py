"""How much memory an inverse adds to the process at its peak: the reference and ours, each in a fresh process.

The bytes of plan and workspace are known before they are allocated, and must agree with what was measured to 10 %.
The other suites measure what a call adds in a process that has run others, which agrees with these figures or is less.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from measure import named

from tarflow_fast.report import Result

QUICK = [("cifar", 16), ("c768_t64", 16)]
FULL = [("imagenet64", 1), ("imagenet64", 4)]
VARIANTS = ("fp32", "bf16", "int8", "reference")
SECONDS = 10  # about what a process takes to start and build its flow
CODE = """
import json, sys
import torch
from memory import added_memory
from workloads import WORKLOADS, build, inputs
from tarflow_fast.transforms import Guidance
from tarflow_fast.engines.cpu import Engine

workload, variant, B = WORKLOADS[sys.argv[1]], sys.argv[2], int(sys.argv[3])
model, reference = build(workload)
noise, labels, _ = inputs(workload, B, False)
warm, _ = build(WORKLOADS["digits"])
warm.sample(1)  # libraries, thread pools
stated = []

@torch.no_grad()
def run():
    if variant == "reference":
        return reference.blocks[0].reverse(noise, labels)
    engine = Engine(variant)
    engine.invert(model.blocks[0].bijection, noise, labels, Guidance())
    stated.append(engine._plan.bytes + engine._workspace.bytes)

print(json.dumps({"grown": added_memory(run), "stated": sum(stated)}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("case, variant", named(QUICK, FULL, lambda name, B: f"{name}-B{B}", VARIANTS))
def test_memory(case, variant, budget, record, benchmark):
    name, B = case
    budget.needs(SECONDS)
    found = {}

    def run():
        command = [sys.executable, "-c", CODE, name, variant, str(B)]
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found.update(json.loads(done.stdout))

    benchmark.pedantic(run, rounds=1, iterations=1)
    if variant != "reference":
        assert 0.9 < found["grown"] / found["stated"] < 1.1, found
    record(Result("memory", "reverse of one block", name, B, variant, "baseline" if variant == "reference" else "ours",
                  baseline="reference", peak_memory=found["grown"]))  # fmt: skip
    benchmark.extra_info.update(peak_memory=found["grown"], stated=found["stated"])
