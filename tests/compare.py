"""Comparing tensors by the project's error rule (tarflow_fast/verify.py), with a report a person can act on."""

import torch

from tarflow_fast.verify.rule import FACTOR, ULPS, error_and_bound


def assert_accurate(name, got, truth, plain, factor=FACTOR, ulps=ULPS):
    """Fails with the first bad element, how many there are, and where NaN and infinities differ.

    truth: float64, or a pair (high, low) of float64 whose sum it is; plain: PyTorch's answer in the precision of `got`.
    """
    assert got.shape == plain.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(plain.shape)}"
    assert got.dtype == plain.dtype, f"{name}: dtype {got.dtype}, expected {plain.dtype}"
    for kind, test in (("NaN", torch.isnan), ("infinity", torch.isinf)):
        places = (test(got) != test(plain)).nonzero().tolist()
        assert not places, f"{name}: {kind} at {len(places)} other places than plain PyTorch, first at {places[0]}"
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


ENOUGH = 24  # numbers of an output


class Judged:
    """Outputs of one computation on several draws of its inputs, judged together.

    The rule measures us by the largest error of plain PyTorch, which is mere luck among a few numbers: of log_dets of 3
    rows, 8 in 100 pass their bound. What has fewer than ENOUGH numbers is therefore computed on more draws.
    """

    def __init__(self):
        self.outputs = {}

    @staticmethod
    def draws(least):
        """On how many draws to compute something whose smallest output has `least` numbers; of no numbers, on one."""
        return -(-ENOUGH // least) if least else 1

    def add(self, name, got, truth, plain):
        """As assert_accurate; nothing is asserted of the numbers yet."""
        self.outputs.setdefault(name, []).append((got.cpu(), truth, plain.cpu()))

    def check(self):
        """Fails as assert_accurate does; the first index is the number of the draw."""
        for name, draws in self.outputs.items():
            got, truths, plain = zip(*draws, strict=True)
            pairs = isinstance(truths[0], tuple)
            truth = tuple(map(torch.stack, zip(*truths, strict=True))) if pairs else torch.stack(truths)
            assert_accurate(name, torch.stack(got), truth, torch.stack(plain))


def same_bits(a, b):
    """Equal bit for bit, NaN and signed zeros included."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))
