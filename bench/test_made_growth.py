"""How sampling grows with the number of features D: ours as one pass, theirs as D passes.

The flows are zuko's, five transforms of (256, 256) and 100 rows. With --save, the curves are drawn too.
"""

import pytest
import torch
from interleave import Interleaved, timed
from made_flows import build
from report import results_folder

from tarflow_fast import made

SIZES = (4, 8, 16, 32, 64, 128, 256, 512)
B, HIDDEN, MOST_SECONDS = 100, 256, 15
LINES = {}


CASES = [(kind, D) for D in SIZES for kind in ("MAF", "NSF")]


@pytest.mark.parametrize("kind, D", CASES, ids=[f"zuko-{kind}-D{D}-B{B}-ours" for kind, D in CASES])
def test_growth(kind, D, table, budget, benchmark):
    pytest.importorskip("zuko")
    flow, ours = build("zuko", kind, D, HIDDEN), build("zuko", kind, D, HIDDEN)
    made.accelerate(ours.module, path="cpu")
    rows = torch.randn(B, D, generator=torch.Generator().manual_seed(2))
    variants = {"ours": lambda: ours.slow(ours.module, B), "one pass": lambda: flow.fast(flow.module, rows)}
    with torch.no_grad():
        for run in variants.values():
            run()
        if D * timed(variants["one pass"]) < MOST_SECONDS:
            variants["theirs"] = lambda: flow.slow(flow.module, B)
            torch.manual_seed(1)
            expected = variants["theirs"]()
            torch.manual_seed(1)
            torch.testing.assert_close(variants["ours"](), expected, rtol=1e-3, atol=1e-3)
        measured = Interleaved(variants)
        once = sum(timed(run) for run in variants.values())
        rounds = budget.rounds(once, 3, max(3, min(15, int(4 / once))))
        benchmark.group = f"made-growth-{kind}"
        benchmark.pedantic(
            variants["ours"], setup=lambda: measured.run_round(without="ours"), rounds=rounds, iterations=1
        )
    measured.seconds["ours"] = list(benchmark.stats.stats.data)
    row = {"flow": kind, "D": D}
    for name in ("theirs", "one pass", "ours"):
        if name in variants:
            found = measured.summary(name)
            LINES.setdefault((kind, name), []).append((D, found["median"], found["p20"], found["p80"]))
            row[f"{name} ms"] = f"{found['median'] * 1e3:.2f}"
        else:
            row[f"{name} ms"] = "not run"
    table("made_growth", row)


def test_draw(request, benchmark):
    folder = results_folder(request.config)
    if folder is None or not LINES:
        pytest.skip("--save NAME draws the curves")
    pytest.importorskip("matplotlib").use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.5), sharey=True, constrained_layout=True)
    for panel, kind, title in zip(panels, ("MAF", "NSF"), ("affine (MAF)", "spline (NSF)"), strict=True):
        for name, label in (
            ("theirs", "zuko, sampling"), ("one pass", "zuko, log_prob"), ("ours", "one sweep, sampling")
        ):  # fmt: skip
            x, y, low, high = zip(*LINES[kind, name], strict=True)
            (line,) = panel.loglog(x, y, "o-", label=label)
            panel.fill_between(x, low, high, alpha=0.2, color=line.get_color())
        panel.set(xlabel="features D", title=f"{title}, 100 rows")
        panel.set_xticks(SIZES, [str(D) for D in SIZES], minor=False)
        panel.set_xticks([], minor=True)
        panel.grid(alpha=0.3)
        panel.legend(loc="upper left")
    panels[0].set_ylabel("seconds (median, 20 to 80 %)")
    folder.mkdir(parents=True, exist_ok=True)
    benchmark.pedantic(lambda: figure.savefig(folder / "made_growth.png", dpi=120), rounds=1, iterations=1)
