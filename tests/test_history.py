"""The results that are kept (bench/history.py), and the tables of README.md and docs/speed.md made of them."""

import dataclasses
import re
import sys
from pathlib import Path

import pytest
from results import machine

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import history

from tarflow_fast.report import Result, Run, read_results, write_runs

ROOT = Path(__file__).parents[1]
VARIANTS = ("reference", "improved", *history.PRECISIONS, *(f"{each} frozen" for each in history.PRECISIONS))


def run_of(speed=4.0, model="Test CPU", cases=history.SHORT):
    """Cases in which everything but the reference, of 10 ms, is `speed` times as fast."""
    rows = [
        Result("block_inverse", "reverse", workload, B, variant, "ours" if variant in history.PRECISIONS else "peer",
               16, "reference", seconds=[0.01 if variant == "reference" else 0.01 / speed] * 6)
        for workload, B in cases for variant in VARIANTS
    ]  # fmt: skip
    return Run("block_inverse", machine(model), "pytest bench/", rows)


@pytest.mark.parametrize("name", history.PAGES)
def test_the_tables_are_those_of_the_results(name):
    """`make readme-table` would change nothing; it would put back a figure that was written by hand."""
    text, folder = (ROOT / name).read_text(), history.RESULTS / history.MACHINE
    assert history.page(text, history.PAGES[name], folder) == text, f"{name} differs: run `make readme-table`"
    figure = re.search(r"\| digits .* (\d+\.\d)", text)
    by_hand = text[: figure.start(1)] + "99.9" + text[figure.end(1) :]
    assert history.page(by_hand, history.PAGES[name], folder) == text != by_hand


def test_figures_of_a_made_up_folder(tmp_path):
    write_runs([run_of()], tmp_path / "2026-01-01-abc.json")
    lines = history.table("short", tmp_path).splitlines()
    assert lines[2] == "| digits | 16 | 128 | 1 | 10 | 4.0x | 4.0x | 4.0x |"
    assert lines[4] == "| mnist | 49 | 128 | 16, guided | 10 | 4.0x | 4.0x | 4.0x |"
    assert history.table("long", tmp_path).splitlines()[2] == (
        "| digits | 16 | 128 | 1 | 10 | 4.0x | 4.0 / 4.0x | 4.0 / 4.0x | 4.0 / 4.0x |"
    )
    assert history.page("a\n<!-- speed: short -->\nold\n<!-- /speed -->\nb", "short", tmp_path) == (
        "a\n<!-- speed: short -->\n" + "\n".join(lines) + "\n<!-- /speed -->\nb"
    )


def test_the_newest_row_counts(tmp_path):
    """The newest date has one case, which replaces that of before; of the others the older file stands."""
    write_runs([run_of(2.0, cases=history.SHORT[:1])], tmp_path / "2026-02-01-000.json")
    write_runs([run_of()], tmp_path / "2026-01-31-fff-dirty.json")
    (tmp_path / "profile.json").write_text("{}")  # no file of the history
    first, second = history.table("short", tmp_path).splitlines()[2:4]
    assert first.endswith("| 2.0x | 2.0x | 2.0x |") and second.endswith("| 4.0x | 4.0x | 4.0x |")


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match=r"must hold <date>-<commit>\.json, got none"):
        history.newest(tmp_path)
    write_runs([run_of(cases=history.SHORT[1:])], tmp_path / "2026-01-01-abc.json")
    with pytest.raises(ValueError, match=r"every row of the README's table, got none of \[\('digits', 1\)\]"):
        history.table("short", tmp_path)
    write_runs([run_of(model="Other CPU")], tmp_path / "2026-01-02-abc.json")
    with pytest.raises(ValueError, match=r"one class of machine, got \['Other CPU.*', 'Test CPU"):
        history.table("short", tmp_path)
    with pytest.raises(ValueError, match="a page must have <!-- speed: short --> and <!-- /speed --> once"):
        history.page("no table", "short", tmp_path)


def test_what_was_converted_is_what_was_measured():
    """Row by row, the files of the history hold what `--convert` read, in the folder of their machine."""
    for old, new in (("epyc-zen5-2cores", "2026-11-22-78a7d51"), ("epyc-zen5-2cores-full", "2026-11-22-918b2d9")):
        before = read_results([history.RESULTS / old]).one_class
        after = read_results([history.RESULTS / history.MACHINE / f"{new}.json"]).one_class
        assert [run.rows for run in after] == [run.rows for run in before]
        assert {run.machine.slug for run in after} == {history.MACHINE}
        assert [dataclasses.replace(run.machine) for run in before] == [run.machine for run in after]
