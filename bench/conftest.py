"""`pytest bench/ --benchmark-only` takes a quarter of an hour or so. `--full` adds the published sizes (an hour).

The tables at the end are the result. `--save NAME` writes them to bench/results/NAME/, with the machine, the versions
and every timing.
"""

import sys
from pathlib import Path

import pytest

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
    """table(name, row) adds a row, which is a dict, to a table of the report."""
    return lambda name, row: TABLES.setdefault(name, []).append(row)


def pytest_benchmark_update_machine_info(config, machine_info):
    from report import machine

    machine_info["tarflow_fast"] = machine()


def pytest_terminal_summary(terminalreporter, config):
    if not TABLES:
        return
    from report import machine, markdown, results_folder, write

    terminalreporter.section("tarflow_fast")
    terminalreporter.write_line("  ".join(f"{key}: {value}" for key, value in machine().items()))
    folder = results_folder(config)
    for name, rows in TABLES.items():
        terminalreporter.write_line(f"\n{name}\n{markdown(rows)}")
        if folder:
            write(folder, name, rows, " ".join(["pytest", *config.invocation_params.args]))
