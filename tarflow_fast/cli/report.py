"""The command `report`: a page of measured speed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg


@dataclass(frozen=True)
class Report:
    """Makes a page of what bench/ measured, in Markdown and HTML; or says what moved between two results."""

    results: Positional[Annotated[tuple[Path, ...], arg(metavar="RESULTS...")]]
    """Files that bench/ wrote, or folders of them."""
    out: Annotated[Path, arg(aliases=["-o"])] = Path("report")
    """Folder of report.md and report.html."""
    compare: bool = False
    """RESULTS are two, BEFORE and AFTER, of one class of machine."""

    def run(self) -> int:
        from tarflow_fast.report import report

        _, page = report(self.results, self.out, compared=self.compare)
        print(page.resolve())
        return 0
