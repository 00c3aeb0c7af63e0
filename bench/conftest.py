"""`pytest bench/ --benchmark-only` takes at most 300 seconds, or as `--budget SECONDS` says. `--full` runs all.

The tables at the end are the result, and what was not measured is listed below them with the reason. The machine, the
versions and every timing go to one file, bench/.cache/results.json, which `tarflow-fast report` reads; `--save` writes
it to bench/results/<machine>/ too.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from session import (  # noqa: F401
    budget,
    full,
    measured,
    of_cases,
    pytest_addoption,
    pytest_benchmark_update_machine_info,
    pytest_collection_modifyitems,
    pytest_configure,
    pytest_runtest_call,
    pytest_runtest_makereport,
    pytest_runtest_setup,
    pytest_terminal_summary,
    record,
    table,
)
