"""The results that are kept, bench/results/<machine>/<date>-<commit>.json, and the tables of speed made of them.

    python bench/history.py                      writes the tables of README.md and docs/speed.md; `make readme-table`
    python bench/history.py --convert FOLDER...  files of results from before there was a schema -> one file of today

A table stands between two comments, <!-- speed: NAME --> and <!-- /speed -->. Of each row the newest file counts, by
its date, and all files are of one class of machine: nothing is put together over machines.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from workloads import WORKLOADS

from tarflow_fast.files import write_atomic
from tarflow_fast.report import Result, Run, read_results, write_runs

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
MACHINE = "amd-epyc-family-26-2-cores-2-threads-avx512bf16"  # the tables are of this one
PAGES = {"README.md": "short", "docs/speed.md": "long"}
DATED = re.compile(r"\d{4}-\d\d-\d\d-[0-9a-f]+(-dirty)?\.json")
SHORT = [
    ("digits", 1),
    ("digits", 100),
    ("mnist, guided", 16),
    ("cifar", 16),
    ("c768_t64", 1),
    ("imagenet64, guided", 1),
]
NAMES = {"c768_t64": "width 768, one block"}  # in the README
PRECISIONS = ("fp32", "bf16", "int8")
MARKED = r"(<!-- speed: {} -->\n).*?(<!-- /speed -->)"


def newest(folder: Path) -> dict[tuple[str, int], tuple[Run, list[Result]]]:
    """(workload, B) -> the run and rows of block_inverse in the newest file that has them."""
    found = {}
    files = sorted(file for file in folder.glob("*.json") if DATED.fullmatch(file.name))
    if not files:
        raise ValueError(f"history: {folder} must hold <date>-<commit>.json, got none")
    classes = set()
    read = [(file.name[:10], run.machine.time, run) for file in files for run in read_results([file]).one_class]
    for *_, run in sorted(read, key=lambda each: each[:2]):  # later rows replace earlier ones
        classes.add(run.machine.name)
        if run.suite == "block_inverse":
            cases: dict[tuple[str, int], list[Result]] = {}
            for row in run.rows:
                cases.setdefault((row.workload, row.B), []).append(row)
            found |= {case: (run, rows) for case, rows in cases.items()}
    if len(classes) != 1:
        raise ValueError(f"history: {folder} must hold results of one class of machine, got {sorted(classes)}")
    return found


def line(case: tuple[str, int], run: Run, rows: Sequence[Result], short: bool) -> str:
    """A row of a table: milliseconds of the reference, and how many times faster the others are."""
    workload, guided = case[0].removesuffix(", guided"), case[0].endswith(", guided")
    flow, named = WORKLOADS[workload], {row.variant: row for row in rows}

    def ratio(variant: str) -> str:
        return f"{run.ratio(named[variant]).median:.1f}"

    one_block = "" if flow.num_blocks > 1 or workload == "c768_t64" else ", one block"
    name = NAMES.get(workload, workload + one_block) if short else workload + one_block
    cells = [name, flow.T, flow.channels, f"{case[1]}{', guided' if guided else ''}"]
    cells.append(f"{named['reference'].median * 1e3:.0f}")
    if short:
        cells += [f"{ratio(precision)}x" for precision in PRECISIONS]
    else:
        cells.append(f"{ratio('improved')}x")
        cells += [f"{ratio(precision)} / {ratio(precision + ' frozen')}x" for precision in PRECISIONS]
    return "| " + " | ".join(map(str, cells)) + " |"


def table(kind: str, folder: Path) -> str:
    """The table as Markdown. Raises ValueError where a row of the short one was never measured."""
    found, short = newest(folder), kind == "short"
    order = list(WORKLOADS)
    every = sorted(
        found, key=lambda case: (order.index(case[0].removesuffix(", guided")), case[1], "guided" in case[0])
    )
    missing = [case for case in SHORT if case not in found]
    if missing:
        raise ValueError(f"history: {folder} must hold every row of the README's table, got none of {missing}")
    columns = ["flow", "T", "C", "batch", "reference, ms", *([] if short else ["improved PyTorch"]), *PRECISIONS]
    head = ["| " + " | ".join(columns) + " |", "| " + " | ".join("---" for _ in columns) + " |"]
    return "\n".join([*head, *(line(case, *found[case], short) for case in (SHORT if short else every))]) + "\n"


def page(text: str, kind: str, folder: Path) -> str:
    """The text with the table between its comments made new. Raises ValueError where the comments are missing."""
    pattern = re.compile(MARKED.format(kind), re.S)
    if len(pattern.findall(text)) != 1:
        raise ValueError(
            f"history: a page must have <!-- speed: {kind} --> and <!-- /speed --> once, got neither or more"
        )
    return pattern.sub(lambda found: found[1] + table(kind, folder) + found[2], text)


def convert(folder: Path) -> Path:
    """Reads files without a schema and writes them as one, under the date of the commit that brought block_inverse."""
    runs = next(iter(read_results([folder]).runs.values()))
    days = subprocess.run(["git", "log", "-1", "--format=%as", "--", str(folder / "block_inverse.json")], cwd=ROOT,
                          capture_output=True, text=True, check=True).stdout.strip()  # fmt: skip
    machine = runs[0].machine
    path = RESULTS / machine.slug / f"{days}-{machine.commit}.json"
    path.parent.mkdir(exist_ok=True)
    write_runs([Run(run.suite, run.machine, run.command, run.rows, run.dropped) for run in runs], path)
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--convert", nargs="+", type=Path, metavar="FOLDER")
    asked = parser.parse_args()
    for folder in asked.convert or []:
        print(convert(folder.resolve()))
    for name, kind in {} if asked.convert else PAGES.items():
        path = ROOT / name
        text = page(path.read_text(), kind, RESULTS / MACHINE)
        write_atomic(path, lambda temporary, text=text: temporary.write_text(text))
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
