"""What bench/ refuses to tell: the speed of a wrong kernel, a ratio to a weakened baseline, a row without its peak."""

import copy
import dataclasses
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from outside import OUTSIDE
from results import SPEEDS, made_run

from tarflow_fast import ReferenceTarFlow, TarFlow, native
from tarflow_fast.cli import main
from tarflow_fast.report import read_results

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import measure
from budget import Budget

ROOT = Path(__file__).parents[1]
BENCH = ROOT / "bench"

pytestmark = pytest.mark.skipif(not native.available(), reason=native.reason() or "native")


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)


def suite(name):
    """The module bench/test_<name>.py, fresh, under a name that no test has."""
    spec = importlib.util.spec_from_file_location(f"bench_of_{name}", BENCH / f"test_{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def inverse_case(*kept):
    """The smallest case of the inverse, with the variants of that name."""
    module = suite("block_inverse")
    module.COMPILING.append(math.inf)  # which leaves the compiled peer out, since compiling takes long
    case = module.make("digits", 1, False, Budget(1000), False)
    case.variants = {name: case.variants[name] for name in kept or case.variants}
    case.seconds = 0.5
    return case


def affine_case():
    return suite("affine").make("digits", 128, "backward")


def density_case():
    return suite("density").make("digits", 1)


def made_case():
    pytest.importorskip("zuko")
    return suite("made").make("zuko", "MAF", 10, 64, 30)


def scaling_case():
    return suite("scaling").make(64, 1)


CASES = {"block_inverse": inverse_case, "affine": affine_case, "density": density_case, "made": made_case,
         "scaling": scaling_case}  # fmt: skip
PLANTED = """
import torch
from tarflow_fast import ops
right = ops.affine
def affine(*given, backend="auto", **more):
    z, log_det = right(*given, backend=backend, **more)
    if backend == "cpu":  # one number in the last row is off by 1e-4
        z = z + 1e-4 * torch.nn.functional.one_hot(torch.tensor(z.numel() - 1), z.numel()).view(z.shape)
    return z, log_det
ops.affine = affine
"""


def run_affine(tmp_path, *arguments):
    """`pytest bench/test_affine.py` on its smallest case: (exit status, what it prints, the file that it writes)."""
    (tmp_path / "wrong_affine.py").write_text(PLANTED)
    path = os.pathsep.join(filter(None, [str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "pytest", str(BENCH / "test_affine.py"), "-k", "digits-forward",
               "--benchmark-only", "-p", "no:cacheprovider", "--results", str(tmp_path / "results.json")]  # fmt: skip
    done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300,
                          env=OUTSIDE | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"})  # fmt: skip
    return done.returncode, done.stdout + done.stderr, tmp_path / "results.json"


def test_a_wrong_kernel_prints_no_speed(tmp_path):
    """The same command twice: with the right kernel it tells both speeds, with one number wrong it tells none."""
    code, text, path = run_affine(tmp_path)
    assert code == 0, text
    rows = {row.variant: row for run in read_results([path]).one_class for row in run.rows}
    assert {*rows} == {"cpu", "torch"} and all(row.seconds and row.share and row.formula for row in rows.values())
    path.unlink()
    code, text, path = run_affine(tmp_path, "-p", "wrong_affine")
    assert code == 1 and "cpu is off by 0.0001, allowed are" in text and "nothing was timed" in text
    assert "GFLOP/s" not in text and "OPS" not in text and not path.exists()


@pytest.mark.parametrize("name", CASES)
def test_every_suite_fails_where_ours_is_wrong(name):
    """Every variant of ours in turn gives what its rule refuses: the case raises and names it, before it is timed."""
    case = CASES[name]()
    ours = [variant for variant, each in case.variants.items() if each.role == "ours"]
    assert ours and all(case.variants[variant].judge for variant in ours)
    for variant in ours[:2]:
        each = case.variants[variant]
        error, allowed = each.judge(each.run())
        assert error <= allowed < math.inf
        changed = copy.copy(case)
        judge = lambda result, each=each, allowed=allowed: (each.judge(result)[0] + 1.01 * allowed, allowed)  # noqa: E731
        changed.variants = case.variants | {variant: dataclasses.replace(each, judge=judge)}
        with pytest.raises(measure.WrongResult, match=f"{case.suite}.*: {variant} is off by .*nothing was timed"):
            measure.measure(changed, Budget(1000))


def test_a_wrong_inverse_is_seen(monkeypatch):
    """One number of the last token of one image is off by 1e-5, which is some 40 times the error of the engine."""
    right = TarFlow.reverse

    def wrong(self, *given, **more):
        images = right(self, *given, **more).clone()
        images[0, 0, 0, -1] += 1e-5
        return images

    case = inverse_case("fp32", "reference")
    monkeypatch.setattr(TarFlow, "reverse", wrong)
    with pytest.raises(measure.WrongResult, match="block_inverse, digits, B 1: fp32 is off by"):
        measure.judge(case)


def test_a_result_that_is_no_number_is_wrong():
    case = inverse_case("fp32", "reference")
    right = case.variants["fp32"]
    case.variants["fp32"] = dataclasses.replace(right, run=lambda: torch.full_like(right.run(), math.nan))
    with pytest.raises(measure.WrongResult, match="fp32 is off by nan"):
        measure.judge(case)


@pytest.mark.parametrize("which", ["reference", "improved"])
def test_a_weakened_baseline_is_named(which, monkeypatch):
    """The reference does its work four times over, or a peer does; the honest ones pass."""
    case = inverse_case("fp32", "reference", "improved", "bare operations")
    rows = measure.measure(case, Budget(1000))
    assert {*rows} == {*case.variants} and rows["reference"].median > rows["fp32"].median
    if which == "reference":
        right = ReferenceTarFlow.reverse
        monkeypatch.setattr(ReferenceTarFlow, "reverse", lambda *a, **k: [right(*a, **k) for _ in range(4)][-1])
    else:
        run = case.variants[which].run
        case.variants[which] = dataclasses.replace(case.variants[which], run=lambda: [run() for _ in range(4)][-1])
    role = {"reference": "baseline", "improved": "peer"}[which]
    with pytest.raises(
        measure.WeakBaseline, match=f"{which} takes .* times as long as its bare operations.*fair {role}"
    ):
        measure.measure(case, Budget(1000))


@pytest.mark.parametrize("name", CASES)
def test_every_row_has_the_share_of_a_peak_and_a_formula(name):
    """The share is the least time over the time taken: at most 1, up to what a peak moves within a run."""
    case = CASES[name]()
    case.seconds = 0.1
    for variant, row in measure.measure(case, Budget(1000)).items():
        assert row.peak in ("memory", "fp32", "bf16", "int8") and 0 < row.share < 1.5 and row.formula, variant
        assert row.flops > 0 and row.peak_rate > 1e8
        if row.peak != "memory":
            assert row.share == pytest.approx(row.flops / row.peak_rate / row.median)


def test_a_suite_that_counts_nothing_is_refused():
    case = inverse_case("fp32", "reference")
    case.variants["fp32"] = dataclasses.replace(case.variants["fp32"], flops=None)
    with pytest.raises(ValueError, match=r"measure: block_inverse must give .*FLOPs of every variant.*\['fp32'\]"):
        measure.measure(case, Budget(1000))
    case = inverse_case("fp32", "reference")
    case.formula = ""
    with pytest.raises(ValueError, match="got formula ''"):
        measure.measure(case, Budget(1000))


def test_machines_are_never_averaged(tmp_path):
    """The section of a machine is, to the letter, that of a page without the other, which is 50 times slower."""
    slow = {name: speed / 50 for name, speed in SPEEDS.items()}
    files = {"one": made_run(), "two": made_run(slow, model="Slow CPU", seed=1)}
    sections = {}
    for name, run in files.items():
        run.write(tmp_path / f"{name}.json")
        assert main(["report", str(tmp_path / f"{name}.json"), "-o", str(tmp_path / name)]) == 0
        sections[name] = (tmp_path / name / "report.md").read_text().split("\n## ")[1]
    assert main(["report", *(str(tmp_path / f"{name}.json") for name in files), "-o", str(tmp_path / "both")]) == 0
    text = (tmp_path / "both" / "report.md").read_text()
    assert [part.strip() for part in text.split("\n## ")[1:]] == [part.strip() for part in sections.values()]
    assert "2 classes of machine follow. Nothing is averaged over them." in text
    found = read_results([tmp_path / "one.json", tmp_path / "two.json"])
    assert [len(runs) for runs in found.runs.values()] == [1, 1]
    with pytest.raises(ValueError, match=r"one class of machine, got 'Test CPU.*' and 'Slow CPU"):
        found.one_class  # noqa: B018


def fake_environment(folder):
    """An environment whose programs are this Python's, already installed."""
    (folder / "bin").mkdir(parents=True)
    for name, runs in (("python", ""), ("tarflow-fast", "-m tarflow_fast")):
        program = folder / "bin" / name
        program.write_text(f'#!/bin/sh\nexec {sys.executable} {runs} "$@"\n')
        program.chmod(0o755)
    return folder


def test_make_bench_ends_with_the_page(tmp_path):
    """A real run of one small case: its rows are on the page whose path is the last line."""
    venv, results = fake_environment(tmp_path / "venv"), tmp_path / "results"
    results.mkdir()
    command = ["make", "bench", f"VENV={venv}", "-o", f"{venv}/.test", f"RESULTS={results}",
               "ARGS=-k digits-forward -p no:cacheprovider --budget 60"]  # fmt: skip
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300,
                          env=OUTSIDE | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    page = Path(done.stdout.strip().splitlines()[-1])
    assert page == results / "report" / "report.html" and "digits, forward, B 128, cpu" in page.read_text()
    assert "of a budget of 60 s" in done.stdout
    assert {run["suite"] for run in json.loads((results / "results.json").read_text())["runs"]} == {"affine"}
