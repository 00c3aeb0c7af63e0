"""What a report says beside its numbers (the machine, the versions, the command), and how a table is written."""

import json
import os
import platform
import subprocess
from pathlib import Path

import torch
from peaks import peaks

from tarflow_fast import native


def results_folder(config):
    """The folder that --save writes to; None without --save."""
    name = config.getoption("--save")
    return Path(__file__).parent / "results" / name if name else None


def machine():
    cpu = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "")
    family = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("cpu family")), "")
    threads = torch.get_num_threads()
    measured = peaks(threads)
    return {
        "cpu": f"{cpu or platform.processor()} (family {family}), {os.cpu_count()} cores",
        "threads": threads,
        "isa": native.isa(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
        "peak_read_GB_s": round(measured["read"] / 1e9, 1),
        "peak_fp32_GFLOP_s": round(measured["fp32"] / 1e9),
        "peak_bf16_GFLOP_s": round(measured["bf16"] / 1e9),
    }


def _lines(path):
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _commit():
    """The commit that is measured, with "-dirty" if a file was changed. Results do not count: they are not measured."""

    folder = Path(__file__).parent

    def git(*arguments):
        return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True).stdout.strip()

    commit = git("describe", "--always")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude)results")
    return (commit + "-dirty" if changed else commit) or "unknown"


def markdown(rows):
    """The rows as a table. Columns that hold lists (raw timings) are left out; the JSON has them."""
    columns = [key for key, value in rows[0].items() if not isinstance(value, (list, dict))]
    widths = [max(len(column), *(len(str(row[column])) for row in rows)) for column in columns]

    def line(cells):
        return "| " + " | ".join(str(cell).ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(columns), line("-" * w for w in widths), *(line(row[c] for c in columns) for row in rows)])


def write(folder, name, rows, command):
    """Write NAME.json, which has every timing, and NAME.md."""
    info = machine()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(
        json.dumps({"machine": info, "command": command, "rows": rows}, indent=1) + "\n"
    )
    facts = "\n".join(f"- {key}: {value}" for key, value in info.items())
    (folder / f"{name}.md").write_text(f"# {name}\n\n`{command}`\n\n{facts}\n\n{markdown(rows)}\n")
