"""The hooks of `pytest bench/`: options, the order of the rows, the budget, results, and what was dropped.

conftest.py takes them from here, and so does any other conftest that wants them.
"""

from __future__ import annotations

import math
import textwrap
import time
from collections import Counter
from pathlib import Path

import pytest
from budget import Budget, seconds

CLOCK = pytest.StashKey()  # a conftest may put a clock here; otherwise it is time.monotonic
BUDGET = pytest.StashKey()
TABLES: dict[str, list[dict]] = {}
RESULTS = []
# The suites in the order of what they tell, and how many cases of each run while one of a suite of weight 1 does.
SUITES = {
    "test_block_inverse": 3, "test_made": 2, "test_density": 1, "test_affine": 1, "test_memory": 1, "test_scaling": 0.5,
    "test_profile": 0.5, "test_made_growth": 0.25, "test_precision": 0.2, "test_families": 0.2, "test_windows": 0.1,
    "test_likelihood": 0.1,
}  # fmt: skip


def pytest_addoption(parser):
    group = parser.getgroup("tarflow_fast")
    group.addoption("--budget", metavar="SECONDS", help="the most that all may take, setups included (default: 300)")
    group.addoption("--full", action="store_true", help="every row, the published sizes at full length too; no budget")
    group.addoption("--seconds", type=float, default=20.0, help="of training, for each flow of test_families.py")
    group.addoption(
        "--save",
        nargs="?",
        const="",
        metavar="NAME",
        help="write the results to bench/results/NAME/<date>-<commit>.json; without NAME, to the machine's",
    )
    group.addoption(
        "--results", metavar="FILE", help="write the results there too (default: bench/.cache/results.json)"
    )


def pytest_configure(config):
    asked, full = config.getoption("--budget"), config.getoption("--full")
    if asked is not None and full:
        raise pytest.UsageError(f"--full has no budget: expected one of --full and --budget, got --budget {asked} too")
    limit = math.inf if full else seconds("300" if asked is None else asked)
    config.addinivalue_line("markers", "full: a row that runs with --full only")
    clock = config.stash.get(CLOCK, None)
    # What the start of Python and the imports took counts, too. They use one core, so their time is the processor's.
    config.stash[BUDGET] = Budget(limit, clock or time.monotonic, 0.0 if clock else time.process_time())


@pytest.fixture
def full(request):
    return request.config.getoption("--full")


@pytest.fixture
def budget(request):
    return request.config.stash[BUDGET]


@pytest.fixture
def table():
    """table(name, row) adds a row, which is a dict, to a table of the report."""
    return lambda name, row: TABLES.setdefault(name, []).append(row)


@pytest.fixture
def record():
    """record(result) adds a `Result` to what is reported."""
    return RESULTS.append


@pytest.fixture(scope="module")
def of_cases():
    """What came of the last case: its name, and its results or the exception that it raised."""
    return {}


@pytest.fixture
def measured(request, benchmark, budget, record, of_cases):
    """measured(name, make, variant) reports one variant of the `Case` that make() gives, which is measured once.

    The first test of a case measures all of its variants in turn. The others report what was measured then.
    """
    from measure import REPLAY, extra, measure

    def report(name, make, variant):
        if name not in of_cases:
            of_cases.clear()  # tests of a case stand together, so no other case is asked for again
            try:
                case = make()
                of_cases[name] = case, measure(case, budget)
            except BaseException as error:
                of_cases[name] = error
                raise
        if isinstance(of_cases[name], BaseException):
            raise of_cases[name]
        case, results = of_cases[name]
        if variant in case.dropped:
            pytest.skip(case.dropped[variant])
        result = results[variant]
        record(result)
        benchmark.group = result.name.rpartition(",")[0]
        REPLAY.load(result.seconds)
        benchmark.pedantic(lambda: None, rounds=len(result.seconds), iterations=1)
        benchmark.extra_info.update(extra(result, _ratio(result, results)))

    return report


def _ratio(result, results):
    from tarflow_fast.report import paired_ratio

    base = results.get(result.baseline)
    return None if base is None else paired_ratio(base.seconds, result.seconds)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """The most telling rows first: the first case of every suite, then its second, and so on; drawings last.

    A suite lists its cases from the most telling on. Variants of a case stay together, since they are timed together.
    """
    places, keys = Counter(), {}
    for item in items:
        suite, case = Path(item.location[0]).stem, _case(item)
        if (suite, case) not in keys:
            last = 2 * (item.name == "test_draw") + (item.get_closest_marker("full") is not None)
            places[suite] += 1
            place = places[suite] / SUITES.get(suite, 1)
            keys[suite, case] = last, place, [*SUITES, suite].index(suite), suite, places[suite]
        if "measured" in item.fixturenames:
            from measure import REPLAY

            item.add_marker(pytest.mark.benchmark(timer=REPLAY))
    items.sort(key=lambda item: keys[Path(item.location[0]).stem, _case(item)])


def _case(item):
    found = getattr(item, "callspec", None)
    kept = {} if found is None else {name: value for name, value in found.params.items() if name != "variant"}
    return item.originalname, repr(kept)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    budget = item.config.stash[BUDGET]
    if item.get_closest_marker("full") and not item.config.getoption("--full"):
        pytest.skip("only with --full")
    if budget.left() <= 0:
        pytest.skip(f"{budget.told()} was spent")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    with item.config.stash[BUDGET].kept():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """What has no figure is listed with its reason, a failure too: a wrong result is no reason to leave a row out."""
    report = yield
    if not report.passed:
        why = str(call.excinfo.value).strip().partition("\n")[0]
        item.config.stash[BUDGET].drop(item.name, why if report.skipped else f"FAILED: {why}")
    return report


def pytest_terminal_summary(terminalreporter, config):
    write_line, budget = terminalreporter.write_line, config.stash[BUDGET]
    if RESULTS or TABLES:
        terminalreporter.section("tarflow_fast")
        _report(write_line, config, budget)
    if budget.dropped:
        terminalreporter.section("not measured")
        for why, names in by_reason(budget.dropped).items():
            write_line(f"{why}:")
            for line in textwrap.wrap(", ".join(names), 116, break_on_hyphens=False):
                write_line(f"    {line}")
    limit = "no budget" if math.isinf(budget.seconds) else f"a budget of {budget.seconds:g} s"
    write_line(f"\n{budget.spent():.0f} s of {limit}")


def by_reason(dropped):
    found = {}
    for name, why in dropped.items():
        found.setdefault(why, []).append(name)
    return found


def _report(write_line, config, budget):
    """Prints every table, and writes them and the results: to the cache always, and where --save says."""
    from report import LATEST, machine, markdown, results_folder, runs, save, write

    from tarflow_fast.report import Dropped, rows_table, to_markdown

    command = " ".join(["pytest", *config.invocation_params.args])
    found = runs(RESULTS, [Dropped(name, why) for name, why in budget.dropped.items()], command)
    write_line("  ".join(f"{key}: {value}" for key, value in machine().facts().items()))
    for run in found:
        write_line(f"\n{to_markdown([rows_table(run)])}")
    for name, rows in TABLES.items():
        write_line(f"\n{name}\n{markdown(rows)}")
    latest, folder = Path(config.getoption("--results") or LATEST), results_folder(config)
    write(latest, found, TABLES)
    write_line(f"\nresults: {save(folder, found, TABLES) if folder else latest}")


def pytest_benchmark_update_machine_info(config, machine_info):
    from report import machine

    machine_info["tarflow_fast"] = machine().facts()
