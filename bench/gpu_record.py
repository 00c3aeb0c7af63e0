"""Times, machine and results of a GPU run.

Times are taken by CUDA events. Each result is a median with the 20 and 80 % quantiles, and is saved as it comes.
"""

import csv
import datetime
import json
import os
import platform
import statistics
import subprocess
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = ["section", "name", "variant", "model", "B", "guided", "dtype", "median_ms", "p20_ms", "p80_ms", "runs"]
COLUMNS += ["GB_s", "TFLOP_s", "share_of_peak", "note"]
DATASHEET = {"H200": (4.8e12, 989e12), "H100": (3.35e12, 989e12), "A100": (2.04e12, 312e12)}  # bytes/s, bf16 FLOP/s


class Budget:
    """The seconds that a run may take, and how many of them are left."""

    def __init__(self, seconds):
        self.end, self.start = time.monotonic() + seconds, time.monotonic()

    def left(self):
        return self.end - time.monotonic()

    def spent(self):
        return time.monotonic() - self.start


class Timer:
    """Times callables on a device by its events, or on a CPU (in a dry run) by the clock."""

    def __init__(self, device):
        self.device = torch.device(device)
        self.cuda = self.device.type == "cuda"
        # This is larger than any L2. Where it is written before a run, the L2 holds nothing of the run before.
        self.flush = torch.empty(256 << 20 if self.cuda else 1, dtype=torch.uint8, device=self.device)

    def synchronize(self):
        if self.cuda:
            torch.cuda.synchronize()

    def milliseconds(self, run, runs=5, warm=1, cold=False):
        """The times of the runs in ms, as a list. cold: with nothing of an earlier run in the L2."""
        for _ in range(warm):
            run()
        times = []
        for _ in range(runs):
            self.synchronize()
            # The device is kept busy while the host launches. Else the start would be stamped at once, and a launch of
            # some microseconds would count as work.
            if cold:
                self.flush.zero_()
            elif self.cuda:
                torch.cuda._sleep(200_000)  # about 0.1 ms
            if self.cuda:
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                run()
                end.record()
                end.synchronize()
                times.append(start.elapsed_time(end))
            else:
                begun = time.perf_counter()
                run()
                times.append(1e3 * (time.perf_counter() - begun))
        return times

    def graph(self, run):
        """A CUDA graph of `run`, so that Python's launches are not in the time. On a CPU it is `run` itself."""
        if not self.cuda:
            return run
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # this compiles, and makes what a library makes once for each stream
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(side)
        self.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(side), torch.cuda.graph(graph, stream=side):
            run()
        return graph.replay

    def peaks(self):
        """The best bytes a second of a copy and bf16 FLOP/s of a matrix product, measured here and now."""
        size = 1 << 30 if self.cuda else 1 << 20
        source, target = (torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(2))
        copy = 2 * size / min(self.milliseconds(lambda: target.copy_(source), 10)) * 1e3
        n = 8192 if self.cuda else 128
        kind = torch.bfloat16 if self.cuda else torch.float32
        a, b = (torch.randn(n, n, device=self.device, dtype=kind) for _ in range(2))
        multiply = 2 * n**3 / min(self.milliseconds(lambda: a @ b, 10, 3)) * 1e3
        return {"bytes": copy, "flops": multiply}


def machine():
    """What the figures depend on."""
    facts = {"time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "seed": 0}
    facts |= {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    try:
        import triton

        facts["triton"] = triton.__version__
    except ImportError:
        facts["triton"] = None
    facts["commit"] = _told("git", "-C", str(ROOT), "describe", "--always", "--dirty") or "unknown"
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        facts |= {"gpu": gpu.name, "gpu_GiB": round(gpu.total_memory / 2**30, 1), "sm": f"{gpu.major}{gpu.minor}"}
        facts |= {"multiprocessors": gpu.multi_processor_count, "cudnn": torch.backends.cudnn.version()}
        facts["driver"] = clocks().get("driver_version")
    return facts


def clocks():
    """Driver, clocks, power and temperature at this moment, as nvidia-smi gives them."""
    names = "driver_version,clocks.sm,clocks.mem,power.draw,temperature.gpu"
    told = _told("nvidia-smi", f"--query-gpu={names}", "--format=csv,noheader")
    return dict(zip(names.split(","), map(str.strip, told.splitlines()[0].split(",")), strict=False)) if told else {}


def _told(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


class Record:
    """Rows and checks. All are written to `folder` after each new one."""

    def __init__(self, folder, facts):
        self.folder, self.facts, self.rows, self.checks, self.skipped = Path(folder), facts, [], [], []
        self.peaks = None
        self.folder.mkdir(parents=True, exist_ok=True)

    def check(self, name, ok, detail=""):
        print(f"  {'ok  ' if ok else 'FAIL'} {name}  {detail}", flush=True)
        self.checks.append({"name": name, "ok": bool(ok), "detail": detail})
        self.save()

    def skip(self, name, why):
        print(f"  not run: {name}: {why}", flush=True)
        self.skipped.append({"name": name, "why": why})
        self.save()

    def row(self, section, name, variant, times, *, scale=1.0, moved=None, flops=None, **about):
        """Adds a row.

        times: in ms, each of which is multiplied by `scale`. moved: bytes that the scaled time moves; flops: likewise.
        """
        times = sorted(scale * t for t in times)
        cuts = statistics.quantiles(times, n=5, method="inclusive") if len(times) > 1 else times * 4
        median = statistics.median(times)
        row = dict.fromkeys(COLUMNS, "") | about | {"section": section, "name": name, "variant": variant}
        row |= {"median_ms": f"{median:.4g}", "runs": len(times)}
        row |= {"p20_ms": f"{cuts[0]:.4g}", "p80_ms": f"{cuts[3]:.4g}"}
        shares = []
        if moved:
            row["GB_s"] = f"{moved / median / 1e6:.4g}"
            shares.append(moved / self.peaks["bytes"])
        if flops:
            row["TFLOP_s"] = f"{flops / median / 1e9:.4g}"
            shares.append(flops / self.peaks["flops"])
        if shares:
            row["share_of_peak"] = f"{max(shares) * 1e3 / median:.1%}"
        self.rows.append(row)
        shown = [str(row[c]) for c in ("section", "name", "variant", "model", "B", "guided", "dtype") if row[c] != ""]
        print(f"  {' '.join(shown)}: {row['median_ms']} ms  {row['share_of_peak']}", flush=True)
        self.save()
        return median

    def save(self):
        with open(self.folder / "gpu.csv.part", "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows)
        os.replace(self.folder / "gpu.csv.part", self.folder / "gpu.csv")
        facts = {"machine": self.facts, "peaks": self.peaks, "checks": self.checks, "not_run": self.skipped}
        (self.folder / "gpu.json").write_text(json.dumps(facts, indent=1) + "\n")
        (self.folder / "gpu.md").write_text(self.markdown())

    def markdown(self):
        head = [f"- {key}: {value}" for key, value in self.facts.items()]
        if self.peaks:
            copied, multiplied = self.peaks["bytes"] / 1e12, self.peaks["flops"] / 1e12
            head.append(f"- measured peaks: {copied:.2f} TB/s copied, {multiplied:.0f} TFLOP/s bf16")
        lines = ["# GPU", "", *head, "", "## Checks", ""]
        lines += [f"- {'ok' if c['ok'] else '**FAILED**'}: {c['name']} {c['detail']}" for c in self.checks]
        lines += [f"- not run: {s['name']} ({s['why']})" for s in self.skipped]
        lines += ["", "## Times", "", "| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
        lines += ["| " + " | ".join(str(row[c]) for c in COLUMNS) + " |" for row in self.rows]
        return "\n".join(lines) + "\n"

    @property
    def ok(self):
        return all(check["ok"] for check in self.checks)
