"""`make gpu`: is it right on this GPU, and how fast? Correctness first, then times in order of importance.

python bench/gpu.py [--seconds 480] [--out bench/results/<gpu>]
python bench/gpu.py --list              the pieces, and about how long each takes
python bench/gpu.py --only 'whole*'     the pieces or groups of these names; may be given more than once
python bench/gpu.py --resume            goes on from what --out holds: what is done stays, what is missing is run
python bench/gpu.py --compile FILE      needs no GPU: fills FILE with compiled kernels, for --cache
python bench/gpu.py --cache FILE        takes kernels that the same Python and Triton compiled (bench/gpu_cache.py)
python bench/gpu.py --dry-run           the same script on the CPU through Triton's interpreter, tiny shapes

It needs torch, triton, numpy, pytest and safetensors, but no install and no network. Each group of pieces has a process
of its own. Where one dies, hangs or loses the GPU, the piece that ran has failed, and a new process goes on with the
next. Everything is saved as it comes (bench/gpu_results.py), and gpu.tar.gz holds all of it. The exit code is 0 where
every check was made and held, 1 where one was not, and 2 where there is no GPU or no such piece.
"""

import argparse
import fnmatch
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from gpu_group import LOST, failed, not_done
from gpu_plan import FIRST, Budget, plan, seconds_of
from gpu_results import ARCHIVE, Record, part_path, read_json, write_all, write_text

HERE = Path(__file__).resolve().parent
GRACE = 20  # seconds that a piece may take past its limit before its process is killed
BEGIN = 120  # seconds that a process may take before its first piece


def main():
    arguments = parse()
    tiny = arguments.dry_run
    pieces = [piece for piece in plan(tiny) if wanted(piece, arguments.only)]
    if not pieces:
        print(f"bench/gpu.py: --only {arguments.only} names no piece and no group; --list shows them")
        return 2
    if arguments.list:
        return show(pieces)
    if arguments.compile:
        import gpu_cache

        return gpu_cache.fill(arguments.compile, arguments.arch)
    import torch

    if not tiny and not torch.cuda.is_available():
        print("bench/gpu.py: no GPU here (torch.cuda.is_available() is false); nothing was measured")
        return 2
    folder = Path(arguments.out or HERE / "results" / ("dry-run" if tiny else gpu_name()))
    folder.mkdir(parents=True, exist_ok=True)
    if not arguments.resume:
        begin_anew(folder)
    environment = environment_of(folder, arguments.cache, tiny)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the tables and the archive are written all the same
    groups = list(dict.fromkeys(piece.group for piece in plan(tiny)))
    begun, budget = time.time(), Budget(arguments.seconds)
    for group in groups:
        try:
            run_group(folder, group, [piece for piece in pieces if piece.group == group], budget, tiny, environment)
        finally:
            checks = write_all(folder, groups, facts_of(folder, begun))
    bad = [check["name"] for check in checks if not check["ok"]]
    print(f"{len(checks) - len(bad)} of {len(checks)} checks held; results in {folder / ARCHIVE}")
    for check in bad:
        print(f"  FAILED: {check}")
    return 1 if bad else 0


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=480, help="time to fit into")
    parser.add_argument("--out", help="folder of the results")
    parser.add_argument("--only", action="append", help="name or pattern of pieces or groups")
    parser.add_argument("--resume", action="store_true", help="go on from what the folder holds")
    parser.add_argument("--list", action="store_true", help="show the pieces")
    parser.add_argument("--cache", help="archive of compiled kernels")
    parser.add_argument("--compile", metavar="FILE", help="compile kernels into this archive, without a GPU")
    parser.add_argument("--arch", type=int, default=90, choices=(80, 90), help="of --compile")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU")
    return parser.parse_args()


def wanted(piece, patterns):
    names = piece.what, piece.group
    return not patterns or any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in patterns)


def show(pieces):
    for piece in pieces:
        print(f"{piece.group:16} {piece.kind:6} {piece.seconds:4} s  {piece.what}")
    first = [piece for piece in pieces if piece.group in FIRST]
    print(f"{seconds_of(pieces)} s in all, {seconds_of(first)} s for {', '.join(FIRST)}")
    return 0


def gpu_name():
    """As nvidia-smi says it: PyTorch would take the GPU to say it, and this process must not."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        told = ""
    return (told.splitlines() or ["gpu"])[0].strip().lower().replace(" ", "-")


def begin_anew(folder):
    shutil.rmtree(folder / "parts", ignore_errors=True)
    for name in ("machine.json", "cache.json", "gpu.csv", "gpu.json", "gpu.md", ARCHIVE):
        (folder / name).unlink(missing_ok=True)


def environment_of(folder, cache, tiny):
    """Of the processes. All of them keep what they compile in one folder, so that nothing is compiled twice."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TARFLOW")}
    if not tiny:
        environment.pop("TRITON_INTERPRET", None)
        environment.setdefault("TRITON_CACHE_DIR", str(folder / "triton-cache"))
        if cache:
            import gpu_cache

            said = gpu_cache.unpack(cache, environment["TRITON_CACHE_DIR"])
            print(said, flush=True)
            write_text(folder / "cache.json", json.dumps(said))
    return environment


def facts_of(folder, begun):
    facts = read_json(folder / "machine.json") or {}
    if said := read_json(folder / "cache.json"):
        facts["cache"] = said
    return facts | {"seconds": round(time.time() - begun)}


def run_group(folder, group, pieces, budget, tiny, environment):
    """Runs the pieces of a group that are not done, in as many processes as it takes."""
    record = Record(folder, group)
    record.forget_unfinished()
    left = [piece for piece in pieces if piece.what not in record.done]
    while left:
        if budget.left() < min(piece.seconds for piece in left):
            for piece in left:
                record.piece = piece.what
                not_done(piece.kind, piece.what, record, f"{budget.left():.0f} s left, about {piece.seconds} s needed")
            return
        status = run_process(folder, group, [piece.what for piece in left], budget, tiny, environment)
        record, died = Record(folder, group), (read_json(part_path(folder, group)) or {}).get("running")
        tried = {entry["piece"] for entry in [*record.checks, *record.skipped]} | set(record.done)
        if status in (0, LOST) and not died:
            lost = []
        elif died:
            lost = [piece for piece in left if piece.what == died["piece"]]
        else:  # it did not begin, and another one would not either
            lost = [piece for piece in left if piece.what not in tried]
        for piece in lost:
            record.piece = piece.what
            failed(piece.kind, piece.what, record, f"its process {ending_of(status)}")
            record.end()
            tried.add(piece.what)
        left = [] if status == 0 else [piece for piece in left if piece.what not in tried]


def run_process(folder, group, names, budget, tiny, environment):
    """Runs one process for these pieces. Returns its exit status, negative for a signal; None where it was killed."""
    seconds = max(budget.left(), 1)
    kind = "tiny" if tiny else "gpu"
    command = [sys.executable, str(HERE / "gpu_group.py"), str(folder), group, f"{seconds:.1f}", kind, *names]
    print(f"{budget.spent():5.0f} s  {group}", flush=True)
    process, begun = subprocess.Popen(command, env=environment), time.time()
    try:
        while (status := process.poll()) is None:
            time.sleep(0.1)
            running = (read_json(part_path(folder, group)) or {}).get("running")
            since, limit = (running["since"], running["limit"]) if running else (begun, BEGIN + seconds)
            if running and time.time() > since + limit + GRACE:
                process.kill()
                process.wait()
                return None
            if not running and time.time() > begun + limit:
                process.kill()
        return status
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def ending_of(status):
    if status is None:
        return "hung and was killed"
    if status < 0:
        return f"was ended by {signal.Signals(-status).name}"
    return f"ended with status {status}"


if __name__ == "__main__":
    sys.exit(main())
