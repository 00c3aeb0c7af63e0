"""bench/gpu.py and bench/roofline.py run from a bare checkout. Without a GPU, gpu.py is tested by its dry run."""

import csv
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

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
    rows = list(csv.DictReader((tmp_path / "out" / "gpu.csv").open()))
    assert {row["section"] for row in rows} >= SECTIONS
    assert all(float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"]) for row in rows)
    table = (tmp_path / "out" / "gpu.md").read_text()
    assert "FAILED" not in table and table.count("\n|") == len(rows) + 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    done = run("gpu.py", "--out", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 2 and "no GPU here" in done.stdout and not (tmp_path / "out").exists()


def test_a_failed_check_fails_the_run(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    from gpu_record import Record

    record = Record(tmp_path, {})
    record.check("one", True)
    assert record.ok
    record.check("two", False, "by 3 ulp")
    assert not record.ok and "- **FAILED**: two by 3 ulp" in (tmp_path / "gpu.md").read_text()


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    import gpu
    import gpu_record

    return gpu, gpu_record


class Seconds:
    """A budget whose remaining seconds a test sets."""

    def __init__(self, seconds):
        self.seconds = seconds

    def left(self):
        return self.seconds

    def spent(self):
        return 0.0


def fails():
    raise ValueError("not on this machine")


@pytest.mark.parametrize(
    "kind, seconds, left, work, failed, skipped",
    [
        ("check", 1, 100, lambda: None, [], []),
        ("check", 50, 10, lambda: None, ["10 s left, about 50 s needed"], []),
        ("time", 50, 10, lambda: None, [], ["10 s left, about 50 s needed"]),
        ("check", 0, 0.2, lambda: time.sleep(20), ["not done after 0 s"], []),
        ("time", 0, 0.2, lambda: time.sleep(20), [], ["not done after 0 s"]),
        ("time", 1, 100, fails, ["ValueError: not on this machine"], []),
        ("peer", 1, 100, fails, [], ["ValueError: not on this machine"]),
    ],
)
def test_pieces(kind, seconds, left, work, failed, skipped, script, tmp_path):
    """A check that was not made counts as failed. If a peer fails, only the comparison with it is missing."""
    gpu, gpu_record = script
    record, begun = gpu_record.Record(tmp_path, {}), time.monotonic()
    gpu.run(gpu.Piece(kind, "it", seconds, work), record, Seconds(left))
    assert time.monotonic() - begun < 10
    assert [check["detail"] for check in record.checks if not check["ok"]] == failed and record.ok == (not failed)
    assert [skip["why"] for skip in record.skipped] == skipped


@pytest.mark.parametrize("work", [lambda: None, fails])
def test_an_alarm_at_the_last_moment(work, script, tmp_path, monkeypatch):
    """An alarm that comes at the last moment ends the piece, and never the run."""
    gpu, gpu_record = script
    setitimer, before = signal.setitimer, signal.getsignal(signal.SIGALRM)

    def disarm_too_late(timer, seconds):
        setitimer(timer, seconds)
        if seconds == 0:
            raise gpu.TooLong

    monkeypatch.setattr(signal, "setitimer", disarm_too_late)
    record = gpu_record.Record(tmp_path, {})
    gpu.run(gpu.Piece("time", "it", 1, work), record, Seconds(100))
    assert [skip["why"] for skip in record.skipped] == ["not done after 40 s"]
    assert signal.getsignal(signal.SIGALRM) is before


@needs_triton
def test_the_plan_of_a_gpu(script):
    """Checks come first, then the times that matter most. By the plan's own estimates, the checks fit into the time."""
    gpu, gpu_record = script
    record = gpu_record.Record.__new__(gpu_record.Record)
    pieces = list(gpu.plan(gpu_record.Timer("cpu"), record, Seconds(480), False))
    kinds = [piece.kind for piece in pieces]
    assert kinds[:3] == ["check"] * 3 and set(kinds) == {"check", "time", "peer"}
    assert sum(piece.seconds for piece in pieces if piece.kind == "check") < 300
    last_check = max(number for number, kind in enumerate(kinds) if kind == "check")
    assert sum(piece.seconds for piece in pieces[: last_check + 1]) < 400
    names = [piece.what for piece in pieces]
    assert names.index("whole sample afhq256 B = 1") < names.index("afhq256, blocks") < names.index("training")
    for what in ("CUDA C++", "compute-sanitizer", "training, torch.compile", "the project's tests on this GPU"):
        assert what in names


def test_roofline(tmp_path):
    """The roofline gives a known figure: one afhq256 image moves 127 MB per step, which is 29.5 us at 4.3 TB/s."""
    done = run("roofline.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    head, *lines = done.stdout.splitlines()
    assert len(lines) == 3 * 3 * 2 and "us/step, measured" in head
    one = next(line.split() for line in lines if line.split()[:3] == ["afhq256", "1", "no"])
    assert one[3:6] == ["114", "13", "0.13"] and one[8] == "29.5"
