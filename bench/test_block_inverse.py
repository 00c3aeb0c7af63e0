"""Times the inverse of whole flows and of published blocks: reference, improved and compiled PyTorch, ours; in turn.

Beside each time stand its ratio to the reference with an interval, its error against the float64 reference, the memory
that the call adds, and the bytes and FLOPs of cost.py with the share of the peak that binds. Bytes count where the
weights of a block do not fit a 16 MB cache and stream from memory. Such a share is more than 100 % where a part of the
weights stays in the cache from one step to the next.

frozen            after model.freeze(), which packs the weights once instead of in every call
bare operations   what reference and improved must take at least; see peers/bare.py
"""

import copy
import time

import pytest
import torch
from cost import inverse_cost, weights_in_memory
from measure import Case, Variant, named
from peers.bare import LIMIT, BareOperations
from peers.improved import ImprovedSampler
from truth import Truth
from workloads import WORKLOADS, build, inputs

QUICK = [
    ("digits", 1, False), ("mnist", 16, True), ("c768_t64", 1, False), ("digits", 100, False), ("cifar", 16, False),
    ("mnist", 1, False), ("digits", 100, True), ("mnist", 100, False), ("cifar", 1, False), ("c768_t64", 16, False),
    ("digits", 16, False), ("mnist", 16, False),
]  # fmt: skip
FULL = [
    ("digits", 1, True), ("digits", 16, True), ("mnist", 1, True), ("mnist", 100, True),
    ("cifar", 1, True), ("cifar", 16, True), ("cifar", 100, False),
    ("c768_t64", 1, True), ("c768_t64", 16, True), ("c768_t64", 100, False),
    ("imagenet64", 1, False), ("imagenet64", 1, True), ("imagenet64", 4, False),
    ("afhq256", 1, False), ("afhq256", 1, True), ("imagenet128", 1, False), ("imagenet128", 4, True),
]  # fmt: skip
CACHE = 16e6  # bytes: half of a 32 MB L3; the other half holds keys, values and what else the machine does
OURS = ("fp32", "bf16", "int8")
VARIANTS = (*OURS, *(f"{precision} frozen" for precision in OURS), "reference", "improved", "compiled")
COMPILING = []  # the seconds that torch.compile took in each case so far


def make(name, B, guided, budget, full):
    workload = WORKLOADS[name]
    torch._dynamo.reset()  # its limit of recompilations counts over all cases; past it, compiled code runs eagerly
    model, reference = build(workload)
    model.backend = "cpu"  # the native engine or an error: it must not fall back
    frozen = copy.deepcopy(model).freeze()
    noise, labels, guidance = inputs(workload, B, guided)
    truth = Truth(workload, reference, noise, labels, guidance)
    case = Case(
        "block_inverse", "reverse", name + (", guided" if guided else ""), B, {}, "reference", workload.T,
        error_of="x, largest", formula="bench/cost.py", seconds=40.0 if full else 16.0, limit=LIMIT,
    )  # fmt: skip

    def add(variant, sampler, role, precision="fp32", floor=None):
        arguments = {"precision": precision} if role == "ours" else {}
        cost = inverse_cost(workload, B, guided, precision)
        case.variants[variant] = Variant(
            lambda: sampler.reverse(noise, labels, **guidance, **arguments), role,
            judge=lambda images: truth.judge(precision, images, model.patchify), bytes=cost.bytes, flops=cost.flops,
            format=precision, streams=weights_in_memory(workload, precision) > CACHE, floor=floor,
        )  # fmt: skip

    for precision in OURS:
        add(precision, model, "ours", precision)
        add(f"{precision} frozen", frozen, "ours", precision)
    add("reference", reference, "baseline", floor="bare operations")
    add("improved", ImprovedSampler(reference), "peer", floor="bare operations")
    if COMPILING and COMPILING[-1] > budget.share():
        case.dropped["compiled"] = f"torch.compile took {COMPILING[-1]:.0f} s in another case: too much of the budget"
    else:
        start = time.perf_counter()
        ImprovedSampler(reference, compiled=True).reverse(noise[:1], None if labels is None else labels[:1], **guidance)
        COMPILING.append(time.perf_counter() - start)
        add("compiled", ImprovedSampler(reference, compiled=True), "peer")
    bare = BareOperations(
        B, workload.T, workload.D, workload.channels, workload.num_blocks, workload.layers_per_block, 1 + guided
    )
    cost = inverse_cost(workload, B, guided)
    case.variants["bare operations"] = Variant(
        bare, "context", bytes=cost.bytes, flops=cost.flops, streams=weights_in_memory(workload, "fp32") > CACHE
    )
    return case


def name_of(workload, B, guided):
    return workload + ("-guided" if guided else "") + f"-B{B}"


@pytest.mark.parametrize("case, variant", named(QUICK, FULL, name_of, (*VARIANTS, "bare operations")))
def test_reverse(case, variant, full, budget, measured):
    measured(name_of(*case), lambda: make(*case, budget, full), variant)
