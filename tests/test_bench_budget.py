"""The budget of `pytest bench/`, on made-up benches with a clock that only they move."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from outside import OUTSIDE

BENCH = Path(__file__).parents[1] / "bench"
CONFTEST = f"""
import sys
sys.path.insert(0, {str(BENCH)!r})
import pytest, session
from session import *
from session import budget, full
class Clock:
    now = 0.0
    def __call__(self):
        return self.now
clock = Clock()
def pytest_configure(config):
    config.stash[session.CLOCK] = clock
    session.pytest_configure(config)
@pytest.fixture
def passes(budget):
    def wait(seconds):
        clock.now += seconds
    return wait
"""
BENCHES = """
import pytest
published = pytest.param("published", marks=pytest.mark.full)
@pytest.mark.parametrize("case", ["first", "second", "third", "slow", published])
def test_{name}(case, budget, passes, benchmark):
    passes({setup})
    rounds = budget.rounds({once} * (40 if case == "slow" else 1), 3, 20)
    benchmark.pedantic(lambda: None, setup=lambda: passes({once} * (40 if case == "slow" else 1)), rounds=rounds)
    print(f"ran {{case}} with {{rounds}} rounds, {{budget.spent():g}} s spent")
"""


@pytest.fixture
def bench(tmp_path):
    """Runs benches of the names, setups and rounds given, and returns the process."""
    (tmp_path / "conftest.py").write_text(CONFTEST)

    def run(*arguments, extra="", **suites):
        for name, (setup, once) in suites.items():
            (tmp_path / f"test_{name}.py").write_text(BENCHES.format(name=name, setup=setup, once=once) + extra)
        command = [sys.executable, "-m", "pytest", str(tmp_path), "-sv", "--benchmark-only", "-p", "no:cacheprovider"]
        done = subprocess.run(
            [*command, *arguments], cwd=tmp_path, env=OUTSIDE, capture_output=True, text=True, timeout=120
        )
        return done.returncode, done.stdout + done.stderr

    return run


def ran(text):
    """(case, rounds, seconds spent), in the order of the run."""
    found = re.findall(r"ran (\w+) with (\d+) rounds, ([\d.]+) s spent", text)
    return [(case, int(rounds), float(spent)) for case, rounds, spent in found]


def not_measured(text):
    lines = text.split(" not measured ")[1].splitlines()[1:]
    found, why = {}, ""
    for line in lines:
        if line.startswith("    "):
            found.update(dict.fromkeys(line.strip().removesuffix(",").split(", "), why))
        else:
            why = line.removesuffix(":")
    return found


def test_slow_setups_count_and_what_is_dropped_is_told(bench):
    """Setups of 20 s and rounds of 1 s: by hand, an eighth of what is left buys 8, 5 and then the fewest rounds."""
    code, text = bench("--budget", "100", one=(20, 1))
    assert code == 0
    # 97 s; 77 left after the setup: 9 rounds, 68 left; 48 after the setup: 6, 42 left; 22 after the setup: 3 (fewest)
    assert ran(text) == [("first", 9, 29), ("second", 6, 55), ("third", 3, 78)]
    told = not_measured(text)
    assert told == {
        "test_one[slow]": "it takes about 120 s; the budget of 100 s had 0 s left",
        "test_one[published]": "only with --full",
    }
    assert "98 s of a budget of 100 s" in text


def test_default_is_300_seconds_and_nothing_starts_after_it(bench):
    code, text = bench(one=(200, 1), two=(200, 1))
    assert code == 0 and [case for case, *_ in ran(text)] == ["first"]
    told = not_measured(text)
    assert told["test_two[first]"] == "it takes about 3 s; the budget of 300 s had 0 s left"
    assert told["test_one[second]"] == told["test_two[third]"] == "the budget of 300 s was spent"
    assert len(told) == 9 and "of a budget of 300 s" in text


def test_full_has_no_budget(bench):
    code, text = bench("--full", one=(1000, 1))
    assert code == 0 and [(case, rounds) for case, rounds, _ in ran(text)] == [
        ("first", 20), ("second", 20), ("third", 20), ("slow", 20), ("published", 20)
    ]  # fmt: skip
    assert "not measured" not in text and "of no budget" in text


def test_the_most_telling_rows_come_first(bench):
    """Three cases of the inverse of blocks, then two of masked flows and so on; never one suite alone."""
    _, text = bench("--collect-only", "-qq", "--budget", "1000", block_inverse=(1, 1), made=(1, 1), other=(1, 1))
    names = re.findall(r"::test_(\w+\[\w+\])", text)
    assert names[:7] == ["block_inverse[first]", "made[first]", "block_inverse[second]", "block_inverse[third]",
                         "made[second]", "other[first]", "block_inverse[slow]"]  # fmt: skip
    assert names[-3:] == ["block_inverse[published]", "made[published]", "other[published]"]


@pytest.mark.parametrize("asked", [("--budget", "0"), ("--budget", "nan"), ("--budget", "soon"), ("--budget", "inf"),
                                   ("--full", "--budget", "10")])  # fmt: skip
def test_refusals(bench, asked):
    code, text = bench(*asked, one=(1, 1))
    assert code == 4 and "got" in text and not ran(text)


def test_a_failure_is_no_way_to_leave_a_row_out(bench):
    extra = "def test_wrong(benchmark):\n    assert False, 'error 3, allowed 1'\n"
    code, text = bench("--budget", "1000", one=(1, 1), extra=extra)
    assert code == 1 and not_measured(text)["test_wrong"] == "FAILED: error 3, allowed 1"


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no alarm")
def test_a_setup_that_does_not_end_is_cut_off(bench, tmp_path):
    """The real clock this time: a loop without an end, under a budget of two seconds."""
    loop = "def test_endless(benchmark):\n    while True:\n        pass\n"
    conftest = CONFTEST.replace("    config.stash[session.CLOCK] = clock\n", "")
    (tmp_path / "conftest.py").write_text(conftest)
    begun = time.monotonic()
    code, text = bench("--budget", "2", "-k", "endless", one=(0, 1), extra=loop)
    assert code == 0 and time.monotonic() - begun < 60
    assert re.fullmatch(r"cut off after \d s: the budget of 2 s was spent", not_measured(text)["test_endless"])


def test_names_of_the_benches():
    """test_<subject>[<workload>-B<b>-<variant>], but for drawings and the one measurement of likelihoods."""
    command = [sys.executable, "-m", "pytest", str(BENCH), "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=BENCH.parent, env=OUTSIDE, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    names = re.findall(r"^bench/test_\w+\.py::(\S+)$", done.stdout, re.M)
    odd = {name for name in names if not re.fullmatch(r"test_\w+\[[\w-]+-B\d+-[\w-]+\]", name)}
    assert len(names) > 500 and odd == {"test_draw", "test_likelihood"}
