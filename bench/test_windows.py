"""The inverse by windows on trained flows: passes, seconds and differences, beside the published Jacobi methods.

passes      of the net, all blocks together; windows: of the row that takes most, and "rows" the mean over rows, where a
            row that is done leaves the passes
fewer       passes of one token after another / passes, of "rows"
ratio       seconds of one token after another / seconds, the median over rounds that run all methods in turn
mean, largest   difference to one token after another, in steps of an 8-bit image; "off" is the share of rows in which
            some pixel differs by more than one step
from bf16   windows that start from a solution in a cheaper precision, whose seconds count; passes are the others
auto        the flow's plan, measured in this run by `calibrate`, decides by block

The price of a pass needs no trained flow: the time of a pass does not depend on the values. Its floor is the larger of
bytes / memory bandwidth and FLOPs / peak; the bend is the number of rows at which the two are equal.
"""

import statistics

import pytest
import torch
from interleave import Interleaved
from peaks import flop_rates, read_rate
from peers.jacobi import METHODS, invert
from window_flows import FLOWS, Setting, in_steps, settings
from workloads import Workload, build

from tarflow_fast import native
from tarflow_fast.engines.call import Call
from tarflow_fast.engines.table import open_passes
from tarflow_fast.solvers.plan import DRAFTS
from tarflow_fast.transforms import Guidance

pytestmark = pytest.mark.skipif(not native.available(), reason=native.reason() or "native")
TOLERANCE = 1e-3


def rounds(benchmark, variants, name, seconds=6.0):
    """Rounds that run all variants in turn, at least 5; pytest-benchmark shows the one called `name`."""
    measured = Interleaved(variants, twice=True)
    measured.run_round()
    once = 2 * sum(times[-1] for times in measured.seconds.values())
    benchmark.pedantic(
        variants[name], setup=lambda: (measured.run_round(without=name), measured.warm_up(name))[2:],
        rounds=max(5, min(30, int(seconds / once))), iterations=1,
    )  # fmt: skip
    for times in measured.seconds.values():
        del times[0]
    measured.seconds[name] = list(benchmark.stats.stats.data)
    return measured


def quantiles(ratios):
    ratios = sorted(ratios)
    return f"{ratios[len(ratios) // 5]:.2f}..{ratios[-1 - len(ratios) // 5]:.2f}"


def row_passes(report):
    """Mean over rows of the passes that a row took part in, all blocks together."""
    return sum(
        torch.cat([(part.accepted > 0).sum(dim=0) for part in report.of(k)]).double().mean() for k in report.blocks
    ).item()


def named(cases, variant=None):
    """pytest's ids of (workload, B, ...): <workload>-B<b>-<variant>."""
    return [f"{case[0]}-B{case[1]}-{variant or case[2]}".replace(", ", "-") for case in cases]


FLOWS_AND_ROWS = [(setting, B) for setting in settings() for B in (16, 1)]


@pytest.mark.parametrize("setting, B", FLOWS_AND_ROWS, ids=named(FLOWS_AND_ROWS, "auto"))
def test_passes(setting, B, table, benchmark):
    model = setting.open()
    noise, y = setting.inputs(model, B)
    T, K, guidance = model.num_tokens, len(model.blocks), setting.guidance
    plan = model.calibrate(
        max(B, 2), tolerance=TOLERANCE, batch_sizes=(B,), precisions=("fp32",), guidance=guidance
    ).plan
    model.solver_plan = plan

    def ours(**arguments):
        return model.reverse(noise, y, guidance, **arguments)

    widths = sorted({W for W in (8, 16, 32, 64, T - 1) if W < T})
    arguments = {"sequential": {"solver": "sequential"}, "auto": {"solver": "auto", "tolerance": TOLERANCE}}
    arguments |= {f"windows {W}": {"solver": "windows", "window": W, "tolerance": TOLERANCE} for W in widths}
    variants = {name: lambda given=given: ours(**given) for name, given in arguments.items()}
    variants |= {
        name: lambda method=method: invert(model, noise, y, method, guidance) for name, method in METHODS.items()
    }
    exact = model.patchify(variants["sequential"]())
    found = {}
    for name in variants:
        if name in arguments:
            x, report = ours(return_report=True, **arguments[name])
            found[name] = model.patchify(x), report.passes, row_passes(report)
            assert name == "auto" or report.residual.max() <= TOLERANCE, f"{setting}, {name}: the promise is broken"
        else:
            x, passes = variants[name]()
            found[name] = x, passes, float(sum(passes.values()))
    benchmark.group = f"windows-{setting}-B{B}"
    measured = rounds(benchmark, variants, "auto")
    base = measured.seconds["sequential"]
    for name, (x, passes, of_rows) in found.items():
        off = in_steps(x, exact)
        ratios = [a / b for a, b in zip(base, measured.seconds[name], strict=True)]
        table("windows", {
            "flow": str(setting), "T": T, "B": B, "method": name, "passes": sum(passes.values()),
            "rows": f"{of_rows:.1f}", "fewer": f"{K * (T - 1) / of_rows:.2f}",
            "by block": " ".join(str(passes[k]) for k in reversed(range(K))),
            "ms": f"{statistics.median(measured.seconds[name]) * 1e3:.2f}", "ratio": f"{statistics.median(ratios):.2f}",
            "p20..p80": quantiles(ratios), "mean": f"{off.mean():.4f}", "largest": f"{off.max():.2f}",
            "off": f"{(off.flatten(1).amax(dim=1) > 1).double().mean():.0%}",
            "seconds": [round(s, 6) for s in measured.seconds[name]],
        })  # fmt: skip


C768 = Workload("c768", 3, 32, 2, 768, 1, 8)
C256 = Workload("c256", 3, 32, 2, 256, 1, 8)


def cost(workload, R, precision):
    """(bytes, FLOPs) of a pass over R rows in one block: its weights once, and its products."""
    C, D, L = workload.channels, workload.D, workload.layers_per_block
    weights = 12 * C * C * L + 3 * C * D
    return weights * (2 if precision == "bf16" else 4), 2 * weights * R


PRICES = [(name, B, precision) for name in ("c768", "c256") for B in (1, 4, 16) for precision in ("fp32", "bf16")]


@pytest.mark.parametrize("workload, B, precision", PRICES, ids=named(PRICES))
def test_price_of_a_pass(workload, B, precision, table, benchmark):
    workload = {"c768": C768, "c256": C256}[workload]
    model, _ = build(workload)
    T, threads = workload.T, torch.get_num_threads()
    bijection, begin = model.blocks[0].bijection, T // 4
    z = torch.randn(B, T, workload.D, generator=torch.Generator().manual_seed(0))
    widths = [W for W in (1, 2, 4, 8, 12, 16, 24, 32, 64, 128) if B * W <= 256]
    with Call("cpu", precision) as call, torch.no_grad():
        passes = open_passes(bijection, z, None, Guidance(), call)
        passes.run(z[:, : T // 2].contiguous(), 0)  # what the queries look at
        tokens = {W: z[:, begin : begin + W].contiguous() for W in widths}
        reads = []

        def run(W):
            passes.run(tokens[W], begin)

        variants = {W: (lambda W=W: run(W)) for W in widths}
        benchmark.group = f"windows-price-{workload.name}-B{B}-{precision}"
        measured = rounds(benchmark, variants, 1, seconds=4.0)
        reads = [read_rate(threads) for _ in range(5)]
    read, peak = statistics.median(reads), flop_rates(threads)[precision]
    one = measured.seconds[1]
    bytes_, flops = cost(workload, 1, precision)
    bend = bytes_ / read / (flops / peak)
    for W in widths:
        seconds = statistics.median(measured.seconds[W])
        bytes_, flops = cost(workload, B * W, precision)
        ratios = [b / a for a, b in zip(one, measured.seconds[W], strict=True)]
        table("windows_price", {
            "workload": workload.name, "precision": precision, "B": B, "W": W, "R": B * W, "ms": f"{seconds * 1e3:.2f}",
            "times W = 1": f"{statistics.median(ratios):.2f}", "p20..p80": quantiles(ratios),
            "GB/s": f"{bytes_ / seconds / 1e9:.0f}", "of the memory's": f"{bytes_ / seconds / read:.0%}",
            "GFLOP/s": f"{flops / seconds / 1e9:.0f}", "of the peak": f"{flops / seconds / peak:.0%}",
            "floor": f"{max(bytes_ / read, flops / peak) / seconds:.0%}", "bend at R": f"{bend:.1f}",
            "seconds": [round(s, 7) for s in measured.seconds[W]],
        })  # fmt: skip


WIDE = [("wide", B, precision) for B in (1, 4) for precision in ("fp32", "bf16")]


@pytest.mark.skipif("wide" not in FLOWS, reason="TARFLOW_WIDE names no flow whose weights exceed the cache")
@pytest.mark.parametrize("flow, B, precision", WIDE, ids=named(WIDE))
def test_flow_beyond_the_cache(flow, B, precision, table, benchmark):
    setting = Setting(flow)
    model = setting.open()
    noise, y = setting.inputs(model, B)
    solvers = {"sequential": {"solver": "sequential"}}
    by_windows = {"solver": "windows", "tolerance": TOLERANCE}
    solvers |= {f"windows {W}": {"window": W, **by_windows} for W in (4, 8, 16)}
    for draft in [each for each, dearer in DRAFTS.items() if precision in dearer]:
        solvers |= {f"{W} from {draft}": {"window": W, "draft": draft, **by_windows} for W in (8, 12, 16)}
    variants = {
        name: lambda given=given: model.reverse(noise, y, precision=precision, **given)
        for name, given in solvers.items()
    }
    passes = {
        name: sum(model.reverse(noise, y, precision=precision, return_report=True, **given)[1].passes.values())
        for name, given in solvers.items()
    }
    benchmark.group = f"windows-wide-B{B}-{precision}"
    measured = rounds(benchmark, variants, "windows 8", seconds=12.0)
    base = measured.seconds["sequential"]
    for name in solvers:
        ratios = [a / b for a, b in zip(base, measured.seconds[name], strict=True)]
        table("windows_wide", {
            "precision": precision, "B": B, "method": name, "passes": passes[name],
            "fewer": f"{passes['sequential'] / passes[name]:.2f}",
            "ms": f"{statistics.median(measured.seconds[name]) * 1e3:.1f}", "ratio": f"{statistics.median(ratios):.2f}",
            "p20..p80": quantiles(ratios), "seconds": [round(s, 6) for s in measured.seconds[name]],
        })  # fmt: skip
