"""What a GPU run consists of: pieces, most important first, each in the group whose process runs it.

The groups of FIRST fit into eight minutes on an H100 by the estimates below: what must be right, whole samples of the
published flows, what a good user of PyTorch gets at best, and the project's tests. It imports no torch.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

FIRST = ("checks", "samples", "baselines", "tests")
START = 8  # seconds that a process takes before its first piece
MODELS = ("afhq256", "imagenet64", "imagenet128")


class Budget:
    """The seconds that a run may take, and how many of them are left."""

    def __init__(self, seconds):
        self.end, self.start = time.monotonic() + seconds, time.monotonic()

    def left(self):
        return self.end - time.monotonic()

    def spent(self):
        return time.monotonic() - self.start


class Piece(NamedTuple):
    """A part of the run.

    Its kind is "check", which must be made and hold, "time" of ours, which must not fail but may be left out, or
    "peer", which may fail and may be left out. Work takes a gpu_group.Bench.
    """

    group: str
    kind: str
    what: str
    seconds: float  # about, with the kernels to be compiled
    work: Callable[[object], None]


def seconds_of(pieces):
    """About how long these pieces take, the start of their processes included."""
    return sum(piece.seconds for piece in pieces) + START * len({piece.group for piece in pieces})


def plan(tiny):
    """The pieces. tiny: those of a dry run."""
    return [*_checks(tiny), *_samples(tiny), *_baselines(tiny), *_tests(tiny), *_more(tiny)]


def _checks(tiny):
    def laws(bench):
        bench.checks.laws(bench.record, bench.device, bench.dtypes, tiny)

    def bits(kind, runs):
        return lambda bench: bench.checks.equal_bits(bench.record, bench.device, bench.dtypes[kind], runs, tiny)

    yield Piece("checks", "check", "laws of a whole model", 20, laws)
    yield Piece("checks", "check", "equal bits", 18, bits(0, 2 if tiny else 1000))
    if not tiny:
        yield Piece("checks", "check", "equal bits, fp16", 8, bits(1, 200))
    # More than 16 rows take other kernels than few do, and at real widths other tiles than at small ones.
    real = [*((model, 40, True) for model in MODELS), ("afhq256", 128, False), ("imagenet128", 128, False)]
    sizes = [("afhq256", 3, True)] if tiny else real
    for model, B, guided in sizes:
        what = f"{model} against float64, B = {B}{' guided' if guided else ''}"
        yield Piece("checks", "check", what, 9, _on(model, "check", B, guided))
    T = 16 if tiny else 1024
    yield Piece(
        "checks", "check", f"attention against float64, T = {T}", 6, lambda bench: bench.checks.attention(bench, T)
    )
    if not tiny:
        yield Piece(
            "checks", "check", "ops against float64", 15, lambda bench: bench.checks.run_verify(bench.record, "cuda")
        )


def _samples(tiny):
    for model in MODELS[:1] if tiny else MODELS:
        seconds = {1: 7, 16: 8, 128: 15 if model == "imagenet128" else 13}
        for B in (1,) if tiny else (1, 16, 128):
            yield _whole("samples", model, B, False, seconds[B])


def _baselines(tiny):
    """The two strongest, on the same block: the step of a static cache as a CUDA graph, and the same compiled."""
    pairs = [(1, False)] if tiny else [(1, False), (16, False), (128, False)]
    yield Piece("baselines", "time", "afhq256, block", 15, _blocks("afhq256", pairs))
    for B, seconds in [(1, 6)] if tiny else [(1, 6), (16, 8), (128, 18)]:
        work = _on("afhq256", "graphed", B, False, False, 1 if tiny else 2)
        yield Piece("baselines", "peer", f"graph of PyTorch, B = {B}", seconds, work)
    for B in () if tiny else (1, 16):
        work = _on("afhq256", "graphed", B, False, True, 2)
        yield Piece("baselines", "peer", f"compiled graph of PyTorch, B = {B}", 35, work)


def _tests(tiny):
    if not tiny:
        work = lambda bench: bench.checks.run_tests(bench.record, bench.budget)  # noqa: E731
        yield Piece("tests", "check", "the project's tests on this GPU", 105, work)


def _more(tiny):
    for model in MODELS[:1] if tiny else MODELS:
        pairs = [(1, True)] if tiny else [(1, True), (16, True), (4, False), (64, False), (128, True)]
        yield Piece("blocks", "time", f"{model}, more blocks", 30, _blocks(model, pairs))
    for B, guided in [(1, False)] if tiny else [(1, False), (16, True), (128, True)]:
        yield Piece("kernels", "time", f"kernels, B = {B}", 12, _step_kernels(B, guided))
    for T in (16,) if tiny else (1024, 256, 2048):
        yield Piece("kernels", "time", f"attention, T = {T}", 8, _attention(T))
    yield Piece("kernels", "time", "kernels of training", 15, _density)
    yield Piece("training", "time", "training", 20, _training(["ours", "reference"]))
    if not tiny:
        yield Piece("training", "peer", "training, torch.compile", 60, _training(["ours", "reference, torch.compile"]))
    for B, guided in [(1, True)] if tiny else [(1, False), (16, True), (128, True)]:
        yield Piece("peers", "peer", f"published step, B = {B}", 6, _on("afhq256", "published", B, guided))
    for B in () if tiny else (16, 128):
        work = _on("afhq256", "graphed", B, True, False, 2)
        yield Piece("peers", "peer", f"graph of PyTorch, B = {B} guided", 20, work)
    yield Piece("peers", "peer", "improved PyTorch", 10, _on("afhq256", "improved", 1, False))
    if not tiny:
        for model in MODELS:
            for B, seconds in ((1, 8), (16, 10), (128, 25)):
                yield _whole("guided samples", model, B, True, seconds)
        work = lambda bench: bench.checks.sanitize(bench.record, min(60, bench.budget.left() - 5))  # noqa: E731
        yield Piece("sanitizer", "peer", "compute-sanitizer", 40, work)


# ---- works -----------------------------------------------------------------------------------------------------------


def _on(model, method, *arguments):
    return lambda bench: getattr(bench.inverse(model), method)(*arguments)


def _blocks(model, pairs):
    return lambda bench: [bench.inverse(model).measure(B, guided, 1 if bench.tiny else 3) for B, guided in pairs]


def _whole(group, model, B, guided, seconds):
    def work(bench):
        from gpu_inverse import whole_sample

        whole_sample(model, bench.timer, bench.record, bench.dtype, B, guided, bench.tiny)

    return Piece(group, "time", f"whole sample {model}, B = {B}{' guided' if guided else ''}", seconds, work)


def _step_kernels(B, guided):
    def work(bench):
        from gpu_kernels import step_kernels

        step_kernels(bench.inverse("afhq256"), B, guided)

    return work


def _attention(T):
    def work(bench):
        from gpu_kernels import attention

        attention(bench.timer, bench.record, bench.dtype, T, bench.tiny)

    return work


def _density(bench):
    from gpu_kernels import density

    density(bench.timer, bench.record, bench.dtype, bench.tiny)


def _training(variants):
    def work(bench):
        from gpu_training import training

        size = 1 if bench.tiny else 8
        training("imagenet64", bench.timer, bench.record, bench.dtype, size, variants, bench.tiny)

    return work
