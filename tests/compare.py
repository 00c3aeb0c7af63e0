"""The error rule: |got - truth| <= 2 |plain - truth| + 2 ulp, plain being PyTorch's answer in the same precision.

The middle term is the largest over the tensor, the last that of each element in the tensor's storage type. The truth is
a float64 tensor or, where float64 itself is judged, a pair (high, low) whose sum is the truth.
"""

import torch

FACTOR, ULPS = 2.0, 2.0


def ulp(truth, dtype):
    """Distance of neighbouring numbers of `dtype` around each element of `truth` (float64)."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(truth.abs().clamp(min=info.tiny, max=info.max)).exponent - 1
    return torch.ldexp(torch.full_like(truth, info.eps), exponent)


def worst(got, truth, plain, factor=FACTOR, ulps=ULPS):
    """(largest error, the bound where it is nearest, largest error / bound): fine while the last is at most 1."""
    error, bound = _error_and_bound(got, truth, plain, factor, ulps)
    if error.numel() == 0:
        return 0.0, 0.0, 0.0
    ratio = (error / bound).flatten()
    at = ratio.argmax()  # a NaN counts as the largest
    return error.max().item(), bound.flatten()[at].item(), ratio[at].item()


def assert_accurate(name, got, truth, plain, factor=FACTOR, ulps=ULPS):
    """Fails with the first bad element, how many there are, and where NaN and infinities differ."""
    assert got.shape == plain.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(plain.shape)}"
    assert got.dtype == plain.dtype, f"{name}: dtype {got.dtype}, expected {plain.dtype}"
    for kind, test in (("NaN", torch.isnan), ("infinity", torch.isinf)):
        places = (test(got) != test(plain)).nonzero().tolist()
        assert not places, f"{name}: {kind} at {len(places)} other places than plain PyTorch, first at {places[0]}"
    error, bound = _error_and_bound(got, truth, plain, factor, ulps)
    bad = ~(error <= bound)
    if not bad.any():
        return
    first, high = tuple(bad.nonzero()[0].tolist()), truth[0] if isinstance(truth, tuple) else truth
    raise AssertionError(
        f"{name}: {int(bad.sum())} of {bad.numel()} elements are off, the worst {(error / bound).max().item():.2f} "
        f"times its bound; first at {first}: got {got[first].item()!r}, truth {high[first].item()!r}, "
        f"plain {plain[first].item()!r}, bound {bound[first].item():.3g}"
    )


def _error_and_bound(got, truth, plain, factor, ulps):
    high, low = truth if isinstance(truth, tuple) else (truth.double(), 0.0)
    # Past the range of the storage type there is no error to measure; assert_accurate compares where that happens.
    measurable = plain.isfinite() & high.isfinite()

    def error_of(value):
        return ((value.double() - high) - low).abs().where(measurable, 0.0)

    largest = error_of(plain).max() if plain.numel() else 0.0
    return error_of(got), factor * largest + ulps * ulp(high, got.dtype)


def same_bits(a, b):
    """Equal bit for bit, NaN and signed zeros included."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))
