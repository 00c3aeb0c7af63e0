"""bench/gpu.py with pieces that die, hang and come too late: the others run, and the archive is written."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[1]
PLAN = """

def plan(tiny):
    import os, time

    def says(name):
        return lambda bench: bench.record.check(name, True, str(os.getpid()))

    def dies(_):
        os.abort()

    def hangs(_):
        import signal
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        time.sleep(600)

    def breaks(bench):
        bench.lost = lambda: True
        raise RuntimeError("an illegal memory access was encountered")

    return [
        Piece("first", "check", "one", 1, says("one")),
        Piece("first", "check", "dies", 1, dies),
        Piece("first", "check", "two", 1, says("two")),
        Piece("first", "peer", "a peer dies", 1, dies),
        Piece("first", "time", "three", 1, says("three")),
        Piece("second", "check", "breaks", 1, breaks),
        Piece("second", "check", "four", 1, says("four")),
        Piece("third", "check", "hangs", 1, hangs),
        Piece("third", "check", "five", 1, says("five")),
        Piece("fourth", "time", "too long", 5000, says("never")),
    ]
"""


@pytest.fixture
def script(tmp_path):
    """Runs a copy of the script with the plan above: script(*arguments) -> (exit code, gpu.json, what was printed)."""
    folder = tmp_path / "bench"
    folder.mkdir()
    for path in (ROOT / "bench").glob("*.py"):
        shutil.copy(path, folder)
    for name in ("tests", "tarflow_fast", "kernels"):
        (tmp_path / name).symlink_to(ROOT / name)
    with open(folder / "gpu_plan.py", "a") as file:
        file.write(PLAN)
    text = (folder / "gpu.py").read_text()
    (folder / "gpu.py").write_text(text.replace("GRACE = 20", "GRACE = 1"))
    text = (folder / "gpu_group.py").read_text()
    (folder / "gpu_group.py").write_text(text.replace("max(3 * piece.seconds, 40)", "3 * piece.seconds"))

    def run(*arguments):
        command = [sys.executable, "-W", "ignore", str(folder / "gpu.py"), "--dry-run", "--out", str(tmp_path / "out")]
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, env=os.environ, timeout=200)
        told = tmp_path / "out" / "gpu.json"
        return done.returncode, json.loads(told.read_text()) if told.exists() else None, done.stdout + done.stderr

    return run


def test_what_dies_leaves_the_others_running(script, tmp_path):
    status, told, _ = script()
    assert status == 1
    failed = {check["name"]: check["detail"] for check in told["checks"] if not check["ok"]}
    assert failed == {
        "dies": "its process was ended by SIGABRT",
        "breaks": "RuntimeError: an illegal memory access was encountered",
        "hangs": "its process hung and was killed",
    }
    held = {check["name"]: check["detail"] for check in told["checks"] if check["ok"]}
    assert set(held) == {"one", "two", "three", "four", "five"}
    assert len(set(held.values())) == 5, "each ran in another process, since one died before it"
    not_run = {skip["name"]: skip["why"] for skip in told["not_run"]}
    assert not_run.pop("a peer dies") == "its process was ended by SIGABRT"
    assert re.fullmatch(r"\d+ s left, about 5000 s needed", not_run.pop("too long")) and not not_run
    with tarfile.open(tmp_path / "out" / "gpu.tar.gz") as archive:
        assert json.load(archive.extractfile("out/gpu.json")) == told


def test_only_and_resume(script):
    """What is done stays. What failed, and what was not run, is tried again."""
    status, told, _ = script("--only", "one", "--only", "f?ur*")
    assert status == 0 and [check["name"] for check in told["checks"]] == ["one", "four"]
    assert [skip["name"] for skip in told["not_run"]] == ["too long"], "of group `fourth`, which the pattern names too"
    first = told["checks"]
    status, told, printed = script("--resume", "--only", "one", "--only", "t*o", "--only", "dies")
    assert status == 1 and [check["name"] for check in told["checks"]] == ["one", "dies", "two", "four"]
    assert [check for check in told["checks"] if check["name"] in ("one", "four")] == first, "they did not run again"
    status, told, _ = script("--resume", "--only", "dies")
    assert status == 1 and sum(check["name"] == "dies" for check in told["checks"]) == 1
    status, told, _ = script("--only", "two")
    assert status == 0 and [check["name"] for check in told["checks"]] == ["two"], "without --resume it begins anew"
    status, _, printed = script("--only", "nothing")
    assert status == 2 and "names no piece and no group" in printed


def test_a_list_of_the_pieces(script):
    status, told, printed = script("--list")
    assert status == 0 and told is None
    assert len(re.findall(r"^\w+ +(?:check|time|peer) +\d+ s  ", printed, re.MULTILINE)) == 10
    assert f"{5009 + 8 * 4} s in all" in printed
