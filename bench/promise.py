"""Checks the promise of windows from outside, on 1000 samples and more of every trained flow, and draws both solvers.

    python bench/promise.py --out bench/results/windows [--n 1000] [--draw docs/windows.png]

For each flow, guidance and tolerance: samples by windows, each block's equations evaluated in one parallel pass of the
plain reference in float64 over the values returned, and the largest residual of any block, row or token. It may pass
the tolerance by rounding alone: by four times the largest residual of the sequential answer, which is exact but for
rounding. With tolerance 0 no bit may differ. Beside it stands the difference to the sequential answer in steps of an
8-bit image: mean, 99.9 %, largest, and the largest by block, in the order in which blocks are solved. `passes` are the
mean over parts of 100 samples, all blocks together. Samples that overflow one token after another are counted, must
overflow by windows too, and take no other part. The script ends with status 1 where the promise is broken.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from PIL import Image
from report import machine, markdown
from window_flows import Setting, in_steps, settings

from tarflow_fast.data.images import make_grid
from tarflow_fast.verify.equations import residuals

TOLERANCES = (1e-4, 1e-3, 4e-3)
ROWS = 100  # judged together: the reference keeps the attention weights of all of them
ROUNDING = 4  # times what the sequential answer leaves


def draw(setting, model, n, **arguments):
    """n samples as stages [(n, T, D)], the scaled noise first, by parts; and the reports."""
    noise, y = setting.inputs(model, n)
    parts, reports = [], []
    for begin in range(0, n, ROWS):
        some = slice(begin, begin + ROWS)
        stages = model.reverse(
            noise[some], None if y is None else y[some], setting.guidance, return_sequence=True, return_report=True,
            nonfinite="ignore",
            **arguments,
        )  # fmt: skip
        stages, report = stages
        stages = [model.patchify(stage) for stage in stages]
        parts.append([noise[some] * model.var.sqrt(), *stages[1:]])
        reports.append(report)
    return [torch.cat(each) for each in zip(*parts, strict=True)], y, reports


def judge(setting, model, stages, y):
    """(K, n, T) residuals, by parts."""
    found = []
    for begin in range(0, len(stages[0]), ROWS):
        some = slice(begin, begin + ROWS)
        part = [stage[some] for stage in stages]
        found.append(residuals(model, part, None if y is None else y[some], setting.guidance))
    return torch.cat(found, dim=1)


def examine(setting: Setting, n: int, window: int) -> list[dict]:
    """A row for every tolerance, after the promise at tolerance 0 was checked."""
    model = setting.open()
    exact, y, _ = draw(setting, model, n, solver="sequential")
    finite = exact[-1].isfinite().flatten(1).all(dim=1)  # a flow may overflow for some noise; no solver can mend that
    rounding = judge(setting, model, exact, y)[:, finite].max().item()
    same, _, _ = draw(setting, model, min(n, 200), solver="windows", tolerance=0, window=window)
    moved = sum(
        int((a.view(torch.int32) != b[: len(a)].view(torch.int32)).sum()) for a, b in zip(same, exact, strict=True)
    )
    rows = [{
        "flow": str(setting), "samples": len(same[0]), "overflow": int((~finite[: len(same[0])]).sum()), "tolerance": 0,
        "passes": "-", "residual": "-", "rounding": f"{rounding:.1e}", "kept": "yes" if moved == 0 else "NO",
        "mean": "0", "99.9 %": "0", "largest": "0", "by block": "no bit differs" if moved == 0 else f"{moved} differ",
    }]  # fmt: skip
    for tolerance in TOLERANCES:
        stages, _, reports = draw(setting, model, n, solver="windows", tolerance=tolerance, window=window)
        worst = judge(setting, model, stages, y)[:, finite].max().item()
        alike = bool((stages[-1].isfinite().flatten(1).all(dim=1) == finite).all())
        off = in_steps(stages[-1], exact[-1])[finite].flatten()
        passes = sum(sum(report.passes.values()) for report in reports) / len(reports)
        ordered = off.sort().values
        rows.append({
            "flow": str(setting), "samples": n, "overflow": int((~finite).sum()), "tolerance": tolerance,
            "passes": f"{passes:.0f}", "residual": f"{worst:.6f}", "rounding": f"{rounding:.1e}",
            "kept": "yes" if alike and worst <= tolerance + ROUNDING * rounding else "NO", "mean": f"{off.mean():.4f}",
            "99.9 %": f"{ordered[int(0.999 * (len(off) - 1))]:.3f}", "largest": f"{ordered[-1]:.2f}",
            "by block": ", ".join(
                f"{in_steps(a, b)[finite].max():.2f}" for a, b in zip(stages[1:], exact[1:], strict=True)
            ),
        })  # fmt: skip
    return rows


def picture(path: Path, tolerance: float = 1e-3, window: int = 16, amplify: int = 100) -> None:
    """Of each flow: one token after another, windows from the same noise, and `amplify` times the difference."""
    strips = []
    for setting in (Setting("fashion", 1.0), Setting("photographs")):
        model = setting.open()
        noise, y = setting.inputs(model, 12, seed=4)
        plain = model.reverse(noise, y, setting.guidance, solver="sequential")
        windows = model.reverse(noise, y, setting.guidance, solver="windows", tolerance=tolerance, window=window)
        rows = torch.cat([plain, windows, ((windows - plain) * amplify).clamp(-1, 1)]).clamp(-1, 1)
        strip = make_grid(rows, 12, scale=3, padding=4)
        strips.append(strip if strip.ndim == 3 else strip[..., None].expand(-1, -1, 3))
    width = max(strip.shape[1] for strip in strips)
    canvas = [torch.nn.functional.pad(strip, (0, 0, 0, width - strip.shape[1]), value=96) for strip in strips]
    Image.fromarray(torch.cat(canvas).numpy()).save(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="folder for promise.json and promise.md")
    parser.add_argument("--n", type=int, default=1000, help="samples of every flow (default: 1000)")
    parser.add_argument("--window", type=int, default=16)
    parser.add_argument("--draw", type=Path, help="write the picture of both solvers here")
    asked = parser.parse_args()
    if asked.draw:
        picture(asked.draw)
    rows = []
    for setting in settings() if asked.n > 0 else []:
        found = examine(setting, asked.n, asked.window)
        rows += found
        print(markdown(found), flush=True)
        if asked.out:
            command = f"python bench/promise.py --n {asked.n} --window {asked.window}"
            asked.out.mkdir(parents=True, exist_ok=True)
            record = {"machine": machine().facts(), "command": command, "rows": rows}
            (asked.out / "promise.json").write_text(json.dumps(record, indent=1) + "\n")
            text = __doc__.replace("\n\n", "\n", 1).partition("\n")[2].partition("\n\n")[2]
            (asked.out / "promise.md").write_text(f"# promise\n\n`{command}`\n\n{text}\n{markdown(rows)}\n")
    return int(any(row["kept"] != "yes" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
