"""Made-up results for the tests of the report: known ratios under known noise."""

import numpy as np

from tarflow_fast.report import Machine, Result, Run

CPU = {"model": "Test CPU", "family": "1", "cores": 2, "threads": 2, "features": ["avx2"]}
INFO = {
    "versions": {"tarflow_fast": "0", "python": "3.11", "torch": "2.13"},
    "cpu": CPU,
    "gpus": [],
    "environment": {},
    "native": {"isa": "avx2", "build": {}},
}
PEAKS = {"read": 50e9, "fp32": 500e9, "bf16": 900e9}
SPEEDS = {"reference": 1.0, "improved": 1.2, "fp32": 5.0, "bf16": 9.0}


def machine(model="Test CPU", **facts):
    return Machine.from_info(INFO | {"cpu": CPU | {"model": model}}, peaks=PEAKS, **facts)


def made_run(speeds=SPEEDS, *, model="Test CPU", rounds=12, noise=0.02, seed=0, workloads=("a", "b"), **more):
    """A run whose variants are `speeds` times as fast as 10 ms, B and T times longer, every round off by the noise."""
    random, rows = np.random.default_rng(seed), []
    for workload in workloads:
        for T, B in ((16, 1), (64, 1), (256, 1), (16, 8)):
            together = 1 + 0.1 * random.random(rounds)  # the machine, in each round
            for variant, speed in speeds.items():
                seconds = 1e-4 * T * B / speed * together * np.exp(noise * random.standard_normal(rounds))
                role = {"reference": "baseline", "improved": "peer"}.get(variant, "ours")
                rows.append(Result(
                    "made_up", "reverse", workload, B, variant, role, T, "reference", seconds=seconds.tolist(),
                    error=2e-7, error_bound=1e-6, error_of="x", bytes=1e6 * T, flops=1e7 * T * B, peak="fp32",
                    peak_rate=PEAKS["fp32"], formula="2 * T", peak_memory=1e6 * B,
                ))  # fmt: skip
    return Run("made_up", machine(model), "pytest bench/test_made_up.py", rows, **more)
