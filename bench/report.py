"""What is written of a run: the machine, and the results and tables of all suites, in one file."""

import datetime
import functools
import subprocess
from pathlib import Path

import torch
from peaks import peaks

from tarflow_fast.info import info
from tarflow_fast.report import Machine, Run, write_runs

FOLDER = Path(__file__).parent
LATEST = FOLDER / ".cache" / "results.json"  # of the last `pytest bench/`, whatever it was; git ignores the folder


def results_folder(config):
    """The folder that --save writes to; None without --save."""
    name = config.getoption("--save")
    return None if name is None else FOLDER / "results" / (name or machine().slug)


@functools.cache
def machine():
    """The machine, with its peaks of this moment. It is measured once a run, because it takes a second."""
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return Machine.from_info(info(), commit=commit(), peaks=peaks(torch.get_num_threads()), time=now)


@functools.cache
def commit():
    """The commit that is measured, with "-dirty" if a file was changed. Results do not count: they are not measured."""

    def git(*arguments):
        return subprocess.run(["git", *arguments], cwd=FOLDER, capture_output=True, text=True).stdout.strip()

    found = git("describe", "--always", "--match=")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude)results")
    return (found + "-dirty" if changed else found) or "unknown"


def runs(results, dropped, command):
    """One `Run` a suite. What was dropped stands in the first."""
    found = {}
    for result in results:
        found.setdefault(result.suite, []).append(result)
    return [
        Run(suite, machine(), command, rows, list(dropped) if number == 0 else [])
        for number, (suite, rows) in enumerate(found.items())
    ]


def save(folder, found, tables):
    """Writes <date>-<commit>.json to the folder, and returns its path."""
    path = folder / f"{machine().time[:10]}-{machine().commit}.json"
    write(path, found, tables)
    return path


def write(path, found, tables):
    """Writes runs, and the tables that have no rounds, to one file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_runs(found, path, tables)


def markdown(rows):
    """The rows as a table. Columns that hold lists (raw timings) are left out; the JSON has them."""
    columns = [key for key, value in rows[0].items() if not isinstance(value, (list, dict))]
    widths = [max(len(column), *(len(str(row[column])) for row in rows)) for column in columns]

    def line(cells):
        return "| " + " | ".join(str(cell).ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(columns), line("-" * w for w in widths), *(line(row[c] for c in columns) for row in rows)])
