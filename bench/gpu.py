"""`make gpu`: is it right on this GPU, and how fast? Correctness first, then times in order of importance.

python bench/gpu.py [--seconds 480] [--out bench/results/<gpu>]
python bench/gpu.py --dry-run      the same script on the CPU through Triton's interpreter, tiny shapes: proves it runs

It needs torch, triton, numpy, pytest and safetensors, but no install and no network. Everything is saved as it comes:
gpu.csv (a row a measurement), gpu.json (machine, clocks, checks), gpu.md (both, to read). The exit code is 0 where
every check was made and held, 1 where one was not, and 2 where there is no GPU.
"""

import argparse
import functools
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import NamedTuple


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=480, help="time to fit into")
    parser.add_argument("--out", help="folder of the results")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU")
    arguments = parser.parse_args()
    if arguments.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is defined
    import torch

    if not arguments.dry_run and not torch.cuda.is_available():
        print("bench/gpu.py: no GPU here (torch.cuda.is_available() is false); nothing was measured")
        return 2
    import gpu_bare
    from gpu_record import Budget, Record, Timer, clocks, machine

    torch.manual_seed(0)
    facts = machine()
    name = "dry-run" if arguments.dry_run else facts["gpu"].lower().replace(" ", "-")
    record = Record(arguments.out or gpu_bare.ROOT / "bench" / "results" / name, facts)
    timer = Timer("cpu" if arguments.dry_run else "cuda")
    budget = Budget(arguments.seconds)
    record.facts["clocks_before"] = clocks()
    record.peaks = timer.peaks()
    print(f"{name}: {record.peaks['bytes'] / 1e12:.2f} TB/s copied, {record.peaks['flops'] / 1e12:.0f} TFLOP/s")
    for piece in plan(timer, record, budget, arguments.dry_run):
        run(piece, record, budget)
        if timer.cuda:
            torch.cuda.empty_cache()
    record.facts["clocks_after"], record.facts["seconds"] = clocks(), round(budget.spent())
    record.save()
    failed = [check["name"] for check in record.checks if not check["ok"]]
    print(f"{len(record.checks) - len(failed)} of {len(record.checks)} checks held; results in {record.folder}")
    for check in failed:
        print(f"  FAILED: {check}")
    return 0 if record.ok else 1


class Piece(NamedTuple):
    """A part of the run.

    Its kind is "check", which must be made and hold, "time" of ours, which must not fail but may be left out, or
    "peer", which may fail and may be left out.
    """

    kind: str
    what: str
    seconds: float  # about
    work: Callable[[], object]


class TooLong(BaseException):
    """It is no Exception, so that what is interrupted does not take it for one of its own."""


def run(piece, record, budget):
    """Runs one piece, for at most three times what it should take, because the rest must have its turn."""
    limit = min(max(3 * piece.seconds, 40), budget.left())
    if budget.left() < piece.seconds:
        _not_done(piece, record, f"{budget.left():.0f} s left, about {piece.seconds} s needed")
        return
    print(f"{budget.spent():5.0f} s  {piece.what}", flush=True)
    before = signal.signal(signal.SIGALRM, _stop)
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, limit)
            piece.work()
        finally:  # inside the outer `try`, so that an alarm at the last moment still finds its handler below
            signal.setitimer(signal.ITIMER_REAL, 0)
    except TooLong:
        _not_done(piece, record, f"not done after {limit:.0f} s")
    except Exception as error:  # The next piece may still run. A piece of ours that cannot run is a failed check.
        traceback.print_exc()
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        if piece.kind == "peer":
            record.skip(piece.what, said)
        else:
            record.check(piece.what, False, said)
    finally:
        signal.signal(signal.SIGALRM, before)


def _stop(*_):
    raise TooLong


def _not_done(piece, record, why):
    if piece.kind == "check":
        record.check(piece.what, False, why)
    else:
        record.skip(piece.what, why)


def plan(timer, record, budget, tiny):
    """The pieces, most important first."""
    import gpu_checks
    import torch
    from gpu_inverse import Inverse, whole_sample
    from gpu_kernels import attention, density, step_kernels
    from gpu_training import training

    dtype = torch.float32 if tiny else torch.bfloat16
    dtypes = [torch.float32] if tiny else [torch.bfloat16, torch.float16, torch.float32]
    device, models = timer.device, ["afhq256"] if tiny else ["afhq256", "imagenet64", "imagenet128"]

    @functools.cache
    def inverse(model):
        return Inverse(model, timer, record, dtype, tiny)

    def blocks(model, batches, runs=1 if tiny else 3):
        return lambda: [inverse(model).measure(B, guided, runs) for B, guided in batches]

    def whole(model, B, guided):
        what = f"whole sample {model} B = {B}{' guided' if guided else ''}"
        return what, lambda: whole_sample(model, timer, record, dtype, B, guided, tiny)

    def on(model, method, *more):
        return lambda: getattr(inverse(model), method)(*more)

    yield Piece("check", "laws of a whole model", 30, lambda: gpu_checks.laws(record, device, dtypes, tiny))
    for kind in dtypes[:2]:
        work = functools.partial(gpu_checks.equal_bits, record, device, kind, 2 if tiny else 1000, tiny)
        yield Piece("check", f"equal bits {kind}", 30, work)
    if not tiny:
        yield Piece("check", "CUDA C++", 40, lambda: gpu_checks.cuda_library(record, device))
        yield Piece("check", "ops against float64", 20, lambda: gpu_checks.run_verify(record, "cuda"))
    for model in models:
        for guided in (True,) if tiny else (False, True):
            what = f"{model} against float64{' guided' if guided else ''}"
            yield Piece("check", what, 8, on(model, "check", guided))
        if not tiny:
            yield Piece("time", f"{model}, one image", 8, blocks(model, [(1, False)], 5))
    for case in [("afhq256", 1, True)] if tiny else [("afhq256", 1, False), ("imagenet64", 32, True)]:
        what, work = whole(*case)
        yield Piece("time", what, 12, work)
    if not tiny:
        yield Piece("check", "the project's tests on this GPU", 60, lambda: gpu_checks.run_tests(record, budget))
    for model in models:
        pairs = [(1, True)] if tiny else [(1, True), (16, False), (16, True), (128, True)]
        yield Piece("time", f"{model}, blocks", 30, blocks(model, pairs))
    for B, guided in [(1, False)] if tiny else [(1, False), (16, True), (128, True)]:
        work = functools.partial(lambda B, guided: step_kernels(inverse("afhq256"), B, guided), B, guided)
        yield Piece("time", f"kernels B = {B}", 12, work)
    for T in (16,) if tiny else (1024, 256, 2048):
        yield Piece("time", f"attention T = {T}", 8, functools.partial(attention, timer, record, dtype, T, tiny))
    yield Piece("time", "kernels of training", 15, lambda: density(timer, record, dtype, tiny))
    variants, size = ["ours", "reference"], 1 if tiny else 8
    work = functools.partial(training, "imagenet64", timer, record, dtype, size, variants, tiny)
    yield Piece("time", "training", 20, work)
    for B, guided in [(1, True)] if tiny else [(1, False), (16, True), (128, True)]:
        yield Piece("peer", f"published step B = {B}", 6, on("afhq256", "published", B, guided))
        work = on("afhq256", "graphed", B, guided, False, 1 if tiny else 2)
        yield Piece("peer", f"graph of PyTorch B = {B}", 10, work)
    if not tiny:
        variants = ["ours", "reference, torch.compile"]
        work = functools.partial(training, "imagenet64", timer, record, dtype, 8, variants)
        yield Piece("peer", "training, torch.compile", 60, work)
        for B in (1, 16):
            work = on("afhq256", "graphed", B, False, True, 2)
            yield Piece("peer", f"compiled graph of PyTorch B = {B}", 45, work)
        for model in models:
            pairs = [(4, False), (4, True), (64, False), (64, True), (128, False)]
            yield Piece("time", f"{model}, more blocks", 25, blocks(model, pairs, 2))
    yield Piece("peer", "improved PyTorch", 10, on("afhq256", "improved", 1, False))
    if not tiny:
        for model in models:
            for B, guided in ((1, True), (16, False), (16, True), (128, False), (128, True)):
                what, work = whole(model, B, guided)
                yield Piece("time", what, 25, work)
        yield Piece("peer", "compute-sanitizer", 40, lambda: gpu_checks.sanitize(record, min(60, budget.left() - 5)))


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    sys.exit(main())
