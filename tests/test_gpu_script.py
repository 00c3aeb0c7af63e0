"""bench/gpu.py and bench/roofline.py run from a bare checkout: here, without a GPU, the former as a dry run."""

import csv
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def run(script, *arguments, cwd, **environment):
    command = [sys.executable, "-W", "ignore", str(ROOT / "bench" / script), *map(str, arguments)]
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(command, cwd=cwd, env=kept | environment, capture_output=True, text=True, timeout=280)


@needs_triton
def test_dry_run(tmp_path):
    done = run("gpu.py", "--dry-run", "--out", tmp_path / "out", cwd=tmp_path, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    told = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert len(told["checks"]) >= 6 and all(check["ok"] for check in told["checks"])
    assert told["machine"]["seed"] == 0 and told["machine"]["torch"] == torch.__version__
    rows = list(csv.DictReader((tmp_path / "out" / "gpu.csv").open()))
    assert {row["section"] for row in rows} >= {"block inverse", "whole sample", "step kernel", "attention", "training"}
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


def test_roofline(tmp_path):
    """research figure: one afhq256 image moves 127 MB a step, 29.5 us at 4.3 TB/s."""
    done = run("roofline.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    head, *lines = done.stdout.splitlines()
    assert len(lines) == 3 * 3 * 2 and "us/step, measured" in head
    one = next(line.split() for line in lines if line.split()[:3] == ["afhq256", "1", "no"])
    assert one[3:6] == ["114", "13", "0.13"] and one[8] == "29.5"
