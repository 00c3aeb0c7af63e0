"""Times the inverse of whole flows and of published blocks: reference, improved and compiled PyTorch, ours; in turn.

ms          the median and the 20 and 80 % quantiles over rounds. If the reference takes less than a second, every
            variant runs twice in a round and the second run counts.
cold        the ratio over those first runs, which find the caches as another variant left them
ratio       reference / variant, the median over rounds
limit       the ratio that would be reached if the bytes alone or the FLOPs alone took all of the time. Bytes count
            where weights stream from memory, at the fastest read of this case.
GB/s        by the formulas of cost.py, and their share of the memory's speed, which is the median of one measurement in
            every round. The share is left out where the weights of a block fit a 16 MB cache and do not stream. It is
            more than 100 % where a part of them stays in the processor's cache from one step to the next.
GFLOP/s     likewise, and their share of the arithmetic peak of the format
frozen      after model.freeze(), which packs the weights once instead of in every call
error       the largest |x - x64| against the float64 reference
"""

import copy
import statistics
import time

import pytest
import torch
from cost import inverse_cost, weights_in_memory
from interleave import Interleaved
from peaks import flop_rates, read_rate
from peers import ImprovedSampler
from truth import Truth
from workloads import WORKLOADS, build, inputs

QUICK = [
    ("digits", 1, False), ("digits", 16, False), ("digits", 100, False), ("digits", 100, True),
    ("mnist", 1, False), ("mnist", 16, False), ("mnist", 16, True), ("mnist", 100, False),
    ("cifar", 1, False), ("cifar", 16, False),
    ("c768_t64", 1, False), ("c768_t64", 16, False),
]  # fmt: skip
FULL = [
    ("digits", 1, True), ("digits", 16, True), ("mnist", 1, True), ("mnist", 100, True),
    ("cifar", 1, True), ("cifar", 16, True), ("cifar", 100, False),
    ("c768_t64", 1, True), ("c768_t64", 16, True), ("c768_t64", 100, False),
    ("imagenet64", 1, False), ("imagenet64", 1, True), ("imagenet64", 4, False),
    ("afhq256", 1, False), ("afhq256", 1, True), ("imagenet128", 1, False), ("imagenet128", 4, True),
]  # fmt: skip
CASES = [(case, False) for case in QUICK] + [(case, True) for case in FULL]
SHORT = 1.0  # seconds
CACHE = 16e6  # bytes: half of a 32 MB L3; the other half holds keys, values and what else the machine does
OURS = ("fp32", "bf16", "int8")


def precision_of(variant):
    precision = variant.removesuffix(" frozen")
    return precision if precision in OURS else "fp32"


def name_of(case):
    workload, B, guided = case[0]
    return f"{workload}-B{B}" + ("-guided" if guided else "")


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_block_inverse(case, full, table, benchmark):
    (name, B, guided), only_full = case
    if only_full and not full:
        pytest.skip("--full")
    workload = WORKLOADS[name]
    torch._dynamo.reset()  # its limit of recompilations counts over all cases; past it, compiled code runs eagerly
    model, reference = build(workload)
    model.backend = "cpu"  # the native engine or an error: it must not fall back
    noise, labels, guidance = inputs(workload, B, guided)
    truth = Truth(workload, reference, noise, labels, guidance)
    variants = {
        "reference": lambda: reference.reverse(noise, labels, **guidance),
        "improved": lambda: improved.reverse(noise, labels, **guidance),
        "compiled": lambda: compiled.reverse(noise, labels, **guidance),
        "fp32": lambda: model.reverse(noise, labels, **guidance, precision="fp32"),
        "bf16": lambda: model.reverse(noise, labels, **guidance, precision="bf16"),
        "int8": lambda: model.reverse(noise, labels, **guidance, precision="int8"),
        "fp32 frozen": lambda: frozen.reverse(noise, labels, **guidance, precision="fp32"),
        "bf16 frozen": lambda: frozen.reverse(noise, labels, **guidance, precision="bf16"),
        "int8 frozen": lambda: frozen.reverse(noise, labels, **guidance, precision="int8"),
    }
    frozen = copy.deepcopy(model).freeze()
    improved, compiled = ImprovedSampler(reference), ImprovedSampler(reference, compiled=True)

    errors, once = {}, {}
    for variant, run in variants.items():  # the first call also compiles and warms up
        start = time.perf_counter()
        images = run()
        once[variant] = time.perf_counter() - start
        assert images.isfinite().all(), variant
        errors[variant] = truth.check(precision_of(variant), images, model.patchify)

    measured, one_round = Interleaved(variants, twice=once["reference"] < SHORT), sum(once.values())
    fewest = 10 if measured.twice else 1 if one_round > 150 else 2 if one_round > 75 else 3
    rounds = max(fewest, min(20, int((40 if full else 16) / one_round)))
    threads, reads = torch.get_num_threads(), []
    streams = {variant: weights_in_memory(workload, precision_of(variant)) > CACHE for variant in variants}

    def others():
        if any(streams.values()):  # otherwise the read would only empty the cache
            reads.append(read_rate(threads))
        measured.run_round(without="fp32")
        measured.warm_up("fp32")

    benchmark.group = name_of(case)
    benchmark.pedantic(variants["fp32"], setup=others, rounds=rounds, iterations=1)
    measured.seconds["fp32"] = list(benchmark.stats.stats.data)

    peak = flop_rates(threads)
    for variant in variants:
        precision = precision_of(variant)
        seconds = measured.summary(variant)
        cost = inverse_cost(workload, B, guided, precision)
        floor = cost.floor(max(reads) if streams[variant] else float("inf"), peak[precision])
        rate, flops = cost.bytes / seconds["median"], cost.flops / seconds["median"]
        row = {
            "workload": name, "B": B, "guided": guided, "variant": variant, "T": workload.T, "C": workload.channels,
            "ms": f"{seconds['median'] * 1e3:.2f}",
            "p20..p80": f"{seconds['p20'] * 1e3:.2f}..{seconds['p80'] * 1e3:.2f}",
            "rounds": seconds["rounds"],
            "ratio": f"{measured.ratio(variant, 'reference'):.1f}",
            "cold": f"{measured.ratio(variant, 'reference', cold=True):.1f}" if measured.twice else "-",
            "limit": f"{measured.summary('reference')['median'] / floor:.1f}",
            "GB/s": f"{rate / 1e9:.1f}",
            "memory": f"{rate / statistics.median(reads):.0%}" if streams[variant] else "-",
            "GFLOP/s": f"{flops / 1e9:.0f}",
            "FLOP": f"{flops / peak[precision]:.0%}",
            "error": f"{errors[variant]:.1e}",
            "seconds": [round(s, 6) for s in measured.seconds[variant]],
            "cold seconds": [round(s, 6) for s in measured.cold[variant]],
        }  # fmt: skip
        table("block_inverse", row)
        if variant == "fp32":
            benchmark.extra_info.update({k: v for k, v in row.items() if k != "seconds"})
