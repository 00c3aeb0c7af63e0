"""Times the slow direction of masked autoregressive flows before and after `made.accelerate`, in turn.

theirs   the library's own inverse, which runs every net once for each of the D features; for normflows' affine flow it
         is the density, for all others sampling
ours     after made.accelerate: one sweep, weights packed at every call;  frozen: packed once
pass     the library's other direction on the same rows: one pass of every net
ratio    theirs / ours, the median over rounds, with its 20 and 80 % quantiles
of pass  ours / pass: below 1 the slow direction has become the faster one
FLOP     the share of the arithmetic peak in fp32, measured in the same run; the multiply-adds are those that the masks
         leave, of one pass
error    the largest |x - x64| over 24 rows or more against the library's own inverse in float64; theirs beside it

By default one row of each kind runs. --full runs the whole grid. A library that would take more than 60 s for one call,
by D times its one pass, is not run, and its column says so.
"""

import copy
import statistics

import pytest
import torch
from interleave import Interleaved, timed
from made_flows import LAYERS, build, double, multiply_adds
from peaks import flop_rates

from tarflow_fast import made

QUICK = [
    ("zuko", "MAF", 64, 256, 1000), ("zuko", "NSF", 64, 256, 1000), ("zuko", "MAF", 256, 512, 100),
    ("zuko", "MAF", 10, 64, 1000), ("zuko", "MAF", 64, 256, 1), ("zuko", "NSF", 64, 256, 1),
    ("nflows", "MAF", 64, 256, 100), ("nflows", "NSF", 64, 256, 100), ("nflows", "NSF", 10, 64, 10000),
    ("normflows", "MAF", 64, 256, 100), ("normflows", "NSF", 64, 256, 100),
]  # fmt: skip
GRID = [
    (library, kind, D, hidden, B)
    for library in ("zuko", "nflows", "normflows")
    for kind in ("MAF", "NSF")
    for D in (10, 64, 256)
    for hidden in (64, 256, 512)
    for B in (1, 100, 10000)
]
CASES = [*QUICK, *(case for case in GRID if case not in QUICK)]
MOST_SECONDS = 60
JUDGED = 24


def check(flow, ours, D, B):
    """Errors of ours and theirs against float64 on the same noise."""
    noise = torch.randn(min(max(B, JUDGED), 100), D, generator=torch.Generator().manual_seed(1))
    truth = flow.inverse(double(flow.module), noise.double())[0]
    theirs = (flow.inverse(flow.module, noise)[0] - truth).abs().max().item()
    got = (flow.inverse(ours, noise)[0] - truth).abs().max().item()
    assert got <= 2 * theirs + 2 * torch.finfo(torch.float32).eps * truth.abs().max().item(), (got, theirs)
    return got, theirs


@pytest.mark.parametrize(("library", "kind", "D", "hidden", "B"), CASES, ids=["-".join(map(str, c)) for c in CASES])
def test_made(library, kind, D, hidden, B, full, table, benchmark):
    pytest.importorskip(library)
    if not full and (library, kind, D, hidden, B) not in QUICK:
        pytest.skip("--full runs the whole grid")
    flow = build(library, kind, D, hidden)
    ours = made.accelerate(copy.deepcopy(flow.module), path="cpu")
    frozen = made.freeze(made.accelerate(copy.deepcopy(flow.module), path="cpu"))
    rows = torch.randn(B, D, generator=torch.Generator().manual_seed(2))
    variants = {
        "ours": lambda: flow.slow(ours, B),
        "frozen": lambda: flow.slow(frozen, B),
        "pass": lambda: flow.fast(flow.module, rows),
    }
    with torch.no_grad():
        for run in variants.values():
            run()
        estimate = D * timed(variants["pass"])
        error = their_error = None
        if estimate < MOST_SECONDS:
            variants["theirs"] = lambda: flow.slow(flow.module, B)
            error, their_error = check(flow, ours, D, B)
        measured = Interleaved(variants, twice=estimate < 1)
        once = sum(timed(run) for run in variants.values())
        rounds = max(3, min(30, int(10 / once)))
        benchmark.group = f"made-{kind}-D{D}-H{hidden}-B{B}"
        benchmark.pedantic(
            variants["ours"],
            setup=lambda: (measured.run_round(without="ours"), measured.warm_up("ours"))[2:],
            rounds=rounds,
            iterations=1,
        )
        measured.seconds["ours"] = list(benchmark.stats.stats.data)

    seconds = {name: statistics.median(times) for name, times in measured.seconds.items()}
    flops = 2 * B * multiply_adds(flow.module)
    peak = flop_rates(torch.get_num_threads())["fp32"]
    row = {"library": library, "flow": f"{kind} {LAYERS} x ({hidden}, {hidden})", "D": D, "B": B}
    if "theirs" in seconds:
        pairs = zip(measured.seconds["theirs"], measured.seconds["ours"], strict=True)
        ratios = sorted(theirs / own for theirs, own in pairs)
        row |= {
            "theirs ms": f"{seconds['theirs'] * 1e3:.1f}", "ours ms": f"{seconds['ours'] * 1e3:.2f}",
            "ratio": f"{statistics.median(ratios):.0f}",
            "p20..p80": f"{ratios[len(ratios) // 5]:.0f}..{ratios[-1 - len(ratios) // 5]:.0f}",
        }  # fmt: skip
    else:
        row |= {"theirs ms": f"not run, about {estimate:.0f} s", "ours ms": f"{seconds['ours'] * 1e3:.2f}"}
        row |= {"ratio": "-", "p20..p80": "-"}
    of_pass = zip(measured.seconds["ours"], measured.seconds["pass"], strict=True)
    row |= {
        "frozen ms": f"{seconds['frozen'] * 1e3:.2f}", "pass ms": f"{seconds['pass'] * 1e3:.2f}",
        "of pass": f"{statistics.median(own / once for own, once in of_pass):.2f}",
        "GFLOP/s": f"{flops / seconds['ours'] / 1e9:.0f}", "FLOP": f"{flops / seconds['ours'] / peak:.0%}",
        "FLOP frozen": f"{flops / seconds['frozen'] / peak:.0%}",
        "error": "-" if error is None else f"{error:.1e}",
        "their error": "-" if their_error is None else f"{their_error:.1e}",
        "rounds": rounds, "seconds": {name: [round(s, 6) for s in times] for name, times in measured.seconds.items()},
    }  # fmt: skip
    table("made", row)
