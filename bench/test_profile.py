"""Where the time of the native inverse goes, part by part by the engine's own clock, beside what the machine allows.

us          microseconds of a step: the mean over the threads at work, the median over rounds. Products include their
            normalisation and epilogue.
GB/s        by the formulas of cost.py, and their share of the memory's speed, which is the median of one measurement in
            every round. Both are left out where weights and cache fit a 32 MB cache. The share is more than 100 % where
            a part of them does.
GFLOP/s     likewise, and their share of the arithmetic peak of the format
"""

import statistics
from dataclasses import replace

import pytest
import torch
from cost import part_costs, weights_in_memory
from interleave import timed
from peaks import flop_rates, read_rate
from report import results_folder
from truth import Truth
from workloads import WORKLOADS, build, inputs

from tarflow_fast.engines.cpu import PARTS, Engine
from tarflow_fast.transforms import Guidance

QUICK = [("mnist", 1, False), ("mnist", 16, False), ("cifar", 1, False), ("cifar", 16, False)]
QUICK += [("c768_t64", 1, False), ("c768_t64", 16, False)]
FULL = [("imagenet64", 1, False), ("imagenet64", 1, True), ("imagenet64", 4, False), ("imagenet64", 16, False)]
CASES = [
    pytest.param((*case, precision), marks=pytest.mark.full if case in FULL else ())
    for case in QUICK + FULL
    for precision in ("fp32", "bf16", "int8")
]
CACHE = 32e6  # bytes of the last-level cache; what is smaller than all of it is not read from memory
CACHES = {"fp32": "fp32", "bf16": "bf16", "int8": "bf16"}  # the format that attention multiplies in
SHARES = {}


def name_of(case):
    workload, B, guided, precision = case
    return workload + ("-guided" if guided else "") + f"-B{B}-{precision}"


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_profile(case, table, budget, benchmark):
    name, B, guided, precision = case
    workload = replace(WORKLOADS[name], num_blocks=1)
    model, reference = build(workload)
    noise, labels, guidance = inputs(workload, B, guided)
    asked = Guidance(guidance.get("guidance", 0.0), attn_temp=guidance.get("attn_temp", 1.0))
    costs, threads = part_costs(workload, B, guided, precision), torch.get_num_threads()
    streams = weights_in_memory(workload, precision) + costs["attention"].cache_bytes / (workload.T - 1) > CACHE
    engine, block, clocks, reads = Engine(precision), model.blocks[0], [], []
    expected, _ = engine.invert(block.bijection, noise, labels, asked)
    truth = Truth(workload, reference, noise, labels, guidance)
    truth.check(precision, model.unpatchify(expected), model.patchify)

    def clear():
        engine.clock = torch.zeros(threads, len(PARTS), dtype=torch.float64)
        if streams:  # otherwise the read would only empty the cache
            reads.append(read_rate(threads))

    def run():
        x, _ = engine.invert(block.bijection, noise, labels, asked)
        clocks.append((x, engine.clock))

    benchmark.group = name_of(case)
    clear()
    once = timed(run)
    clocks.clear(), reads.clear()
    rounds = budget.rounds(once, 3, 3 if workload.T > 256 else 10)
    benchmark.pedantic(run, setup=clear, rounds=rounds, iterations=1)
    assert all(torch.equal(x, expected) for x, _ in clocks)
    worked = [clock[clock.sum(dim=1) > 0] for _, clock in clocks]  # a thread may have had nothing to do
    means = [clock.mean(dim=0).tolist() for clock in worked if len(clock) == max(len(each) for each in worked)]
    seconds = {part: statistics.median(mean[k] for mean in means) for k, part in enumerate(PARTS)}
    total, peak = sum(seconds.values()), flop_rates(threads)
    for part, spent in seconds.items():
        row = {"workload": name, "B": B, "guided": guided, "precision": precision, "part": part}
        row |= {"us": f"{spent / (workload.T - 1) * 1e6:.1f}", "share": f"{spent / total:.0%}"}
        row |= {"GB/s": "-", "memory": "-", "GFLOP/s": "-", "FLOP": "-"}
        if part in costs:
            cost = costs[part]
            rate, flops = cost.bytes / spent, cost.flops / spent
            kind = {"proj_in": "fp32", "proj_out": "fp32", "attention": CACHES[precision]}.get(part, precision)
            row |= {"GFLOP/s": f"{flops / 1e9:.0f}", "FLOP": f"{flops / peak[kind]:.0%}"}
            if streams:
                row |= {"GB/s": f"{rate / 1e9:.1f}", "memory": f"{rate / statistics.median(reads):.0%}"}
        table("profile", row)
    SHARES[name_of(case)] = [seconds[part] / total for part in PARTS]


def test_draw(request, benchmark):
    folder = results_folder(request.config)
    if folder is None or not SHARES:
        pytest.skip("--save NAME draws the shares")
    pytest.importorskip("matplotlib").use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 1 + 0.3 * len(SHARES)), constrained_layout=True)
    left = [0.0] * len(SHARES)
    for k, part in enumerate(PARTS):
        widths = [100 * shares[k] for shares in SHARES.values()]
        axes.barh(list(SHARES), widths, left=left, label=part, color=pyplot.get_cmap("tab10")(k))
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set(xlabel="% of the time of the native inverse", xlim=(0, 100))
    axes.legend(ncols=len(PARTS), loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize="small")
    folder.mkdir(parents=True, exist_ok=True)
    benchmark.pedantic(lambda: figure.savefig(folder / "profile.png", dpi=120), rounds=1, iterations=1)
