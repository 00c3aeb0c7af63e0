"""bench/gpu.py and bench/roofline.py run from a bare checkout. Without a GPU, gpu.py is tested by its dry run."""

import csv
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[1]
SECTIONS = {"block inverse", "whole sample", "step kernel", "attention", "training kernel", "training"}
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def run(script, *arguments, cwd, **environment):
    command = [sys.executable, "-W", "ignore", str(ROOT / "bench" / script), *map(str, arguments)]
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(command, cwd=cwd, env=kept | environment, capture_output=True, text=True, timeout=280)


@needs_triton
def test_dry_run(tmp_path):
    """The dry run needs only torch, triton, numpy, pytest and safetensors, and nothing else that an install brings."""
    bare = tmp_path / "bare"
    for name in ("tyro", "tqdm", "PIL", "sklearn", "hypothesis", "pytest_benchmark", "matplotlib", "xdist"):
        (bare / name).mkdir(parents=True)
        (bare / name / "__init__.py").write_text(f"raise ImportError('{name} is not here')\n")
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(bare)}
    done = run("gpu.py", "--dry-run", "--out", tmp_path / "out", cwd=tmp_path, **environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    told = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert len(told["checks"]) >= 6 and all(check["ok"] for check in told["checks"])
    assert told["machine"]["seed"] == 0 and told["machine"]["torch"] == torch.__version__
    with tarfile.open(tmp_path / "out" / "gpu.tar.gz") as archive:
        assert {"out/gpu.csv", "out/gpu.json", "out/gpu.md", "out/parts/checks.json"} <= set(archive.getnames())
        packed = archive.extractfile("out/gpu.csv").read()
    assert packed == (tmp_path / "out" / "gpu.csv").read_bytes()
    rows = list(csv.DictReader((tmp_path / "out" / "gpu.csv").open()))
    assert {row["section"] for row in rows} >= SECTIONS
    assert all(float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"]) for row in rows)
    table = (tmp_path / "out" / "gpu.md").read_text()
    assert "FAILED" not in table and table.count("\n|") == len(rows) + 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    done = run("gpu.py", "--out", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 2 and "no GPU here" in done.stdout and not (tmp_path / "out").exists()


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """Makes a stand-in for gpu_group.Bench, which a piece is run with."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    import gpu_results

    record = gpu_results.Record(tmp_path, "group")
    return lambda left: SimpleNamespace(record=record, budget=Seconds(left), tiny=True)


class Seconds:
    """A budget whose remaining seconds a test sets."""

    def __init__(self, seconds):
        self.seconds = seconds

    def left(self):
        return self.seconds


def fails(_):
    raise ValueError("not on this machine")


@pytest.mark.parametrize(
    "kind, seconds, left, work, failed, skipped, done",
    [
        ("check", 1, 100, lambda _: None, [], [], True),
        ("check", 50, 10, lambda _: None, ["10 s left, about 50 s needed"], [], False),
        ("time", 50, 10, lambda _: None, [], ["10 s left, about 50 s needed"], False),
        ("check", 0, 0.2, lambda _: time.sleep(20), ["not done after 0 s"], [], True),
        ("time", 0, 0.2, lambda _: time.sleep(20), [], ["not done after 0 s"], True),
        ("time", 1, 100, fails, ["ValueError: not on this machine"], [], True),
        ("peer", 1, 100, fails, [], ["ValueError: not on this machine"], True),
    ],
)
def test_pieces(kind, seconds, left, work, failed, skipped, done, bench):
    """A check that was not made counts as failed. If a peer fails, only the comparison with it is missing."""
    import gpu_group
    from gpu_plan import Piece

    made, begun = bench(left), time.monotonic()
    gpu_group.run(Piece("group", kind, "it", seconds, work), made)
    assert time.monotonic() - begun < 10
    record = made.record
    assert [check["detail"] for check in record.checks if not check["ok"]] == failed and record.ok == (not failed)
    assert [skip["why"] for skip in record.skipped] == skipped
    assert record.done == ["it"] * done and record.running is None


@pytest.mark.parametrize("work", [lambda _: None, fails])
def test_an_alarm_at_the_last_moment(work, bench, monkeypatch):
    """An alarm that comes at the last moment ends the piece, and never the run."""
    import gpu_group
    from gpu_plan import Piece

    setitimer, before = signal.setitimer, signal.getsignal(signal.SIGALRM)

    def disarm_too_late(timer, seconds):
        setitimer(timer, seconds)
        if seconds == 0:
            raise gpu_group.TooLong

    monkeypatch.setattr(signal, "setitimer", disarm_too_late)
    made = bench(100)
    gpu_group.run(Piece("group", "time", "it", 1, work), made)
    assert [skip["why"] for skip in made.record.skipped] == ["not done after 40 s"]
    assert signal.getsignal(signal.SIGALRM) is before


def test_a_graph_that_could_not_be_captured_is_a_failed_check(bench):
    """The engine warns, and answers without a graph. The piece goes on."""
    import gpu_group
    from gpu_plan import Piece

    went_on = []

    def work(_):
        warnings.warn("tarflow_fast runs its GPU inverse without a CUDA graph: no room", RuntimeWarning)
        warnings.warn("something else", UserWarning)
        went_on.append(True)

    made = bench(100)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        gpu_group.run(Piece("group", "peer", "it", 1, work), made)
    assert [str(each.message) for each in shown][1:] == ["something else"], "other warnings are shown as before"
    (check,) = made.record.checks
    assert went_on and not check["ok"] and check["detail"].endswith("without a CUDA graph: no room")


def test_the_plan_of_a_gpu(bench):
    """What matters most comes first, and fits into the time by the plan's own estimates."""
    from gpu_plan import FIRST, plan, seconds_of

    pieces = plan(tiny=False)
    names = [piece.what for piece in pieces]
    assert len(set(names)) == len(names) and {piece.kind for piece in pieces} == {"check", "time", "peer"}
    assert tuple(dict.fromkeys(piece.group for piece in pieces))[: len(FIRST)] == FIRST
    first = [piece for piece in pieces if piece.group in FIRST]
    assert pieces[: len(first)] == first and seconds_of(first) <= 460
    assert all(piece in first for piece in pieces if piece.kind == "check")
    samples = {f"whole sample {m}, B = {B}" for m in ("afhq256", "imagenet64", "imagenet128") for B in (1, 16, 128)}
    checked = {f"{m} against float64, B = {B}" for m in ("afhq256", "imagenet128") for B in ("40 guided", "128")}
    baselines = {f"{kind} of PyTorch, B = {B}" for kind in ("graph", "compiled graph") for B in (1, 16)}
    for wanted in (samples, checked, baselines, {"attention against float64, T = 1024"}):
        assert wanted <= {piece.what for piece in first}
    assert next(iter(dict.fromkeys(piece.group for piece in plan(tiny=True)))) == "checks"


def test_roofline(tmp_path):
    """The roofline gives a known figure: one afhq256 image moves 127 MB per step, which is 29.5 us at 4.3 TB/s."""
    done = run("roofline.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    head, *lines = done.stdout.splitlines()
    assert len(lines) == 3 * 3 * 2 and "us/step, measured" in head
    one = next(line.split() for line in lines if line.split()[:3] == ["afhq256", "1", "no"])
    assert one[3:6] == ["114", "13", "0.13"] and one[8] == "29.5"
