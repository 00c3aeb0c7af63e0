"""Times by CUDA events, and what the figures of a GPU run depend on."""

import datetime
import platform
import subprocess
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


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
