"""The process of one group: runs its pieces one after another, and saves what they record (gpu_results.Record).

It is started by bench/gpu.py:    python bench/gpu_group.py FOLDER GROUP SECONDS KIND PIECE ...

KIND is "gpu", or "tiny" for a dry run. It exits with 0 after the last piece, and with LOST where the GPU takes no more
work, as it does after an illegal access: then another process must go on.
"""

import functools
import os
import signal
import sys
import traceback
import warnings

from gpu_plan import Budget, plan
from gpu_results import Record, read_json, write_text

LOST = 3
NO_GRAPH = "without a CUDA graph"  # of the warning that engines/triton_graph.py gives


class Bench:
    """What the pieces of a process share.

    Args:
        dtypes: "bf16" and so on, of the checks; the first one is what is timed.
    """

    def __init__(self, record, budget, tiny, dtypes=None):
        import gpu_bare  # noqa: F401
        import gpu_checks
        import torch
        from gpu_timer import Timer

        torch.manual_seed(0)
        kinds = [torch.float32] if tiny else [torch.bfloat16, torch.float16, torch.float32]
        self.record, self.budget, self.tiny, self.dtypes = record, budget, tiny, dtypes or kinds
        self.checks, self.timer, self.dtype = gpu_checks, Timer("cpu" if tiny else "cuda"), self.dtypes[0]
        self.device = self.timer.device

    @functools.cache  # noqa: B019 (there is one Bench in a process)
    def inverse(self, model):
        from gpu_inverse import Inverse

        return Inverse(model, self.timer, self.record, self.dtype, self.tiny)

    def lost(self):
        """Whether the GPU takes no more work from this process."""
        import torch

        if not self.timer.cuda:
            return False
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError:
            return True
        return False


class TooLong(BaseException):
    """It is no Exception, so that what is interrupted does not take it for one of its own."""


def main():
    folder, group, seconds, kind, *names = sys.argv[1:]
    if kind == "tiny":
        os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is defined
    budget, record = Budget(float(seconds)), Record(folder, group)
    bench = Bench(record, budget, kind == "tiny")
    record.peaks = machine_facts(folder, bench.timer)["peaks"]
    for piece in plan(kind == "tiny"):
        if piece.group == group and piece.what in names:
            run(piece, bench)
            if bench.lost():
                return LOST
    return 0


def machine_facts(folder, timer):
    """What is known of the machine. The first process of a run measures its peaks, and all others read them."""
    from gpu_timer import clocks, machine

    path = os.path.join(folder, "machine.json")
    facts = read_json(path)
    if facts is None:
        import json

        facts = machine() | {"clocks": clocks(), "peaks": timer.peaks()}
        write_text(path, json.dumps(facts, indent=1) + "\n")
    return facts


def limit_of(piece, budget):
    """Seconds after which a piece is stopped, because the rest must have its turn."""
    return min(max(3 * piece.seconds, 40), budget.left())


def run(piece, bench):
    """Runs one piece, for at most three times what it should take."""
    record, budget = bench.record, bench.budget
    limit = limit_of(piece, budget)
    record.begin(piece.what, limit)
    if budget.left() < piece.seconds:
        not_done(piece.kind, piece.what, record, f"{budget.left():.0f} s left, about {piece.seconds} s needed")
        record.end(finished=False)
        return
    print(f"{budget.left():5.0f} s left  {piece.what}", flush=True)
    before = signal.signal(signal.SIGALRM, _stop)
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, limit)
            with warnings.catch_warnings():
                warnings.showwarning = _told_of_captures(record, warnings.showwarning)
                warnings.filterwarnings("always", f".*{NO_GRAPH}", RuntimeWarning)
                piece.work(bench)
        finally:  # inside the outer `try`, so that an alarm at the last moment still finds its handler below
            signal.setitimer(signal.ITIMER_REAL, 0)
    except TooLong:
        not_done(piece.kind, piece.what, record, f"not done after {limit:.0f} s")
    except Exception as error:  # The next piece may still run. A piece of ours that cannot run is a failed check.
        traceback.print_exc()
        failed(piece.kind, piece.what, record, f"{type(error).__name__}: {error}".splitlines()[0])
    finally:
        signal.signal(signal.SIGALRM, before)
        record.end()


def _told_of_captures(record, show):
    """Shows warnings as before. A CUDA graph that could not be captured costs no answer, but it is a failed check."""

    def shown(message, *more, **options):
        if NO_GRAPH in str(message):
            record.check("a CUDA graph was captured", False, str(message).splitlines()[0])
        show(message, *more, **options)

    return shown


def _stop(*_):
    raise TooLong


def failed(kind, what, record, why):
    """A peer that fails is missing from the comparison. A piece of ours that fails is a failed check."""
    if kind == "peer":
        record.skip(what, why)
    else:
        record.check(what, False, why)


def not_done(kind, what, record, why):
    if kind == "check":
        record.check(what, False, why)
    else:
        record.skip(what, why)


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    sys.exit(main())
