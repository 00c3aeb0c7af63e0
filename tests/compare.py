"""Compares tensors by the project's error rule (tarflow_fast/verify/rule.py), and reports what a person can act on."""

import torch

from tarflow_fast.verify.rule import FACTOR, ULPS, error_and_bound


def assert_accurate(name, got, truth, plain, factor=FACTOR, ulps=ULPS):
    """Fails if an element of `got` is off, and reports the first such element and the number of them.

    It also fails where `got` has a NaN or an infinity and `plain` has none, or the other way round.

    Args:
        truth: the exact result in float64, or a pair (high, low) of float64 tensors whose sum is the exact result.
        plain: PyTorch's result in the precision of `got`.
    """
    assert got.shape == plain.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(plain.shape)}"
    assert got.dtype == plain.dtype, f"{name}: dtype {got.dtype}, expected {plain.dtype}"
    for kind, test in (("NaN", torch.isnan), ("infinity", torch.isinf)):
        places = (test(got) != test(plain)).nonzero().tolist()
        assert not places, f"{name}: {kind} differs from plain PyTorch at {len(places)} places, first at {places[0]}"
    error, bound = error_and_bound(got, truth, plain, factor, ulps)
    bad = ~(error <= bound)
    if not bad.any():
        return
    first, high = tuple(bad.nonzero()[0].tolist()), truth[0] if isinstance(truth, tuple) else truth
    raise AssertionError(
        f"{name}: {int(bad.sum())} of {bad.numel()} elements are off, the worst {(error / bound).max().item():.2f} "
        f"times its bound; first at {first}: got {got[first].item()!r}, truth {high[first].item()!r}, "
        f"plain {plain[first].item()!r}, bound {bound[first].item():.3g}"
    )


ENOUGH = 24  # an output with this many numbers is judged on one draw


class Judged:
    """Collects the outputs of one computation on several draws of its inputs, and judges them together.

    The rule compares our error with the largest error of plain PyTorch. Among a few numbers that largest error is mere
    luck: 8 of 100 draws of 3 log_dets exceed their bound. An output of fewer than ENOUGH numbers is therefore computed
    on more draws.
    """

    def __init__(self):
        self.outputs = {}

    @staticmethod
    def draws(least):
        """The number of draws to compute when the smallest output has `least` numbers: one draw if it has none."""
        return -(-ENOUGH // least) if least else 1

    def add(self, name, got, truth, plain):
        """Takes the arguments of assert_accurate and keeps them for `check`."""
        self.outputs.setdefault(name, []).append((got.cpu(), truth, plain.cpu()))

    def check(self):
        """Fails as assert_accurate does. The first index it reports is the number of the draw."""
        for name, draws in self.outputs.items():
            got, truths, plain = zip(*draws, strict=True)
            pairs = isinstance(truths[0], tuple)
            truth = tuple(map(torch.stack, zip(*truths, strict=True))) if pairs else torch.stack(truths)
            assert_accurate(name, torch.stack(got), truth, torch.stack(plain))


def same_bits(a, b):
    """Whether two tensors are equal bit for bit, NaN and signed zeros included."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))
