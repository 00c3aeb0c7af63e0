"""Reports of measured speed: one form for results, intervals over interleaved rounds, a page, and a comparison.

bench/ writes `Run`s of `Result`s as JSON. `report` makes one Markdown and one HTML file of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tarflow_fast.files import write_atomic
from tarflow_fast.report.compare import compare, compare_blocks
from tarflow_fast.report.document import to_html, to_markdown
from tarflow_fast.report.interval import FEWEST, Interval, paired_ratio, ratio_of_medians
from tarflow_fast.report.machine import Machine
from tarflow_fast.report.page import losing, report_blocks, rows_table
from tarflow_fast.report.read import Results, read_results
from tarflow_fast.report.record import Dropped, Result, Run, binding, write_runs

__all__ = [
    "FEWEST", "Dropped", "Interval", "Machine", "Result", "Results", "Run", "binding", "compare", "losing",
    "paired_ratio", "ratio_of_medians", "read_results", "report", "rows_table", "to_markdown", "write_runs",
]  # fmt: skip


def report(results: Sequence[str | Path], out: str | Path, *, compared: bool = False) -> tuple[Path, Path]:
    """Writes report.md and report.html to the folder `out`, and returns their paths.

    results: files and folders that bench/ wrote. compared: there are two of them, and the page says what moved.

    Raises FileNotFoundError and ValueError as `read_results` and `compare` do.
    """
    if compared and len(results) != 2:
        raise ValueError(f"report: a comparison needs two results, before and after, got {len(results)}")
    if compared:
        blocks = compare_blocks(*(read_results([each]) for each in results))
    else:
        blocks = report_blocks(read_results(results))
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    pages = {"report.md": to_markdown(blocks), "report.html": to_html(blocks[0].text, blocks)}
    for name, text in pages.items():
        write_atomic(folder / name, lambda temporary, text=text: temporary.write_text(text, encoding="utf-8"))
    return folder / "report.md", folder / "report.html"
