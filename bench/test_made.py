"""Times the slow direction of masked autoregressive flows before and after `made.accelerate`, in turn.

theirs   the library's own inverse, which runs every net once for each of the D features; for normflows' affine flow it
         is the density, for all others sampling
ours     after made.accelerate: one sweep, weights packed at every call;  frozen: packed once
pass     the library's other direction on the same rows: one pass of every net

FLOPs are the multiply-adds that the masks leave, of one pass. Errors are the largest |x - x64| over 24 rows or more
against the library's own inverse in float64. Without --full one row of each kind runs, of the whole grid. A library
that would take more than 60 s for one call, by D times its one pass, is not run.
"""

import copy

import pytest
import torch
from interleave import timed
from made_flows import LAYERS, build, double, multiply_adds
from measure import Case, Variant, named

from tarflow_fast import made

QUICK = [
    ("zuko", "MAF", 64, 256, 1000), ("nflows", "NSF", 64, 256, 100), ("zuko", "MAF", 64, 256, 1),
    ("normflows", "NSF", 64, 256, 100), ("zuko", "MAF", 10, 64, 1000), ("nflows", "MAF", 64, 256, 100),
    ("zuko", "NSF", 64, 256, 1), ("normflows", "MAF", 64, 256, 100), ("zuko", "MAF", 256, 512, 100),
    ("nflows", "NSF", 10, 64, 10000), ("zuko", "NSF", 64, 256, 1000),
]  # fmt: skip
GRID = [
    (library, kind, D, hidden, B)
    for library in ("zuko", "nflows", "normflows")
    for kind in ("MAF", "NSF")
    for D in (10, 64, 256)
    for hidden in (64, 256, 512)
    for B in (1, 100, 10000)
]
VARIANTS = ("ours", "frozen", "theirs", "pass")
MOST_SECONDS = 60
JUDGED = 24


@torch.no_grad()
def errors(flow, ours, D, B):
    """Errors of ours and theirs against float64 on the same noise, and what is allowed of ours."""
    noise = torch.randn(min(max(B, JUDGED), 100), D, generator=torch.Generator().manual_seed(1))
    truth = flow.inverse(double(flow.module), noise.double())[0]
    theirs = (flow.inverse(flow.module, noise)[0] - truth).abs().max().item()
    got = (flow.inverse(ours, noise)[0] - truth).abs().max().item()
    return got, theirs, 2 * theirs + 2 * torch.finfo(torch.float32).eps * truth.abs().max().item()


def make(library, kind, D, hidden, B):
    pytest.importorskip(library)
    flow = build(library, kind, D, hidden)
    ours = made.accelerate(copy.deepcopy(flow.module), path="cpu")
    frozen = made.freeze(made.accelerate(copy.deepcopy(flow.module), path="cpu"))
    rows = torch.randn(B, D, generator=torch.Generator().manual_seed(2))

    def slow(module):
        return torch.no_grad()(lambda: flow.slow(module, B))

    flops = 2.0 * B * multiply_adds(flow.module)
    case = Case("made", "slow direction", f"{library} {kind} {LAYERS} x ({hidden}, {hidden}), D {D}", B, {}, "theirs",
                error_of="x, largest", formula="multiply-adds that the masks leave", seconds=10.0)  # fmt: skip
    one_pass = torch.no_grad()(lambda: flow.fast(flow.module, rows))
    one_pass()
    estimate = D * timed(one_pass)
    judges = {}
    if estimate < MOST_SECONDS:
        for name, module in (("ours", ours), ("frozen", frozen)):
            got, theirs, allowed = errors(flow, module, D, B)
            judges[name], judges["theirs"] = (got, allowed), (theirs, allowed)
        case.variants["theirs"] = Variant(slow(flow.module), "baseline", judge=lambda _: judges["theirs"], flops=flops)
    else:
        case.dropped["theirs"] = f"one call would take about {estimate:.0f} s"
    for name, module in (("ours", ours), ("frozen", frozen)):
        judge = (lambda _, name=name: judges[name]) if judges else None
        case.variants[name] = Variant(slow(module), judge=judge, flops=flops)
    case.variants["pass"] = Variant(one_pass, "context", flops=flops)
    return case


def name_of(library, kind, D, hidden, B):
    return f"{library}-{kind}-D{D}-H{hidden}-B{B}"


GRID = [case for case in GRID if case not in QUICK]


@pytest.mark.parametrize("case, variant", named(QUICK, GRID, name_of, VARIANTS))
def test_slow_direction(case, variant, measured):
    measured(case, lambda: make(*case), variant)
