"""`pytest bench/ --benchmark-only`: a few minutes. `--full` adds the published sizes at full length, about an hour.

The table at the end is the result; `--save NAME` writes it, with machine, versions and every timing, to
bench/results/NAME/.
"""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
TABLES = {}


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="the published sizes at full length too")
    parser.addoption("--save", metavar="NAME", help="write the tables to bench/results/NAME/")


@pytest.fixture
def full(request):
    return request.config.getoption("--full")


@pytest.fixture
def table():
    """table(name, row): adds a row, a dict, to a table of the report."""
    return lambda name, row: TABLES.setdefault(name, []).append(row)


def machine():
    from peaks import peaks

    from tarflow_fast import native

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
    folder = Path(__file__).parent
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=folder, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def markdown(rows):
    """A table of the columns whose values are short; lists (raw timings) stay in the JSON."""
    columns = [key for key, value in rows[0].items() if not isinstance(value, (list, dict))]
    widths = [max(len(column), *(len(str(row[column])) for row in rows)) for column in columns]

    def line(cells):
        return "| " + " | ".join(str(cell).ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(columns), line("-" * w for w in widths), *(line(row[c] for c in columns) for row in rows)])


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["tarflow_fast"] = machine()


def pytest_terminal_summary(terminalreporter, config):
    if not TABLES:
        return
    info = machine()
    terminalreporter.section("tarflow_fast")
    terminalreporter.write_line("  ".join(f"{key}: {value}" for key, value in info.items()))
    folder = config.getoption("--save") and Path(__file__).parent / "results" / config.getoption("--save")
    for name, rows in TABLES.items():
        terminalreporter.write_line(f"\n{name}\n{markdown(rows)}")
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{name}.json").write_text(json.dumps({"machine": info, "rows": rows}, indent=1) + "\n")
            command = " ".join(["pytest", *config.invocation_params.args])
            head = "\n".join(f"- {key}: {value}" for key, value in info.items())
            (folder / f"{name}.md").write_text(f"# {name}\n\n`{command}`\n\n{head}\n\n{markdown(rows)}\n")
