"""Acceptance on the device (kernels/triton/accept.py) is the rule of the solver by windows, state by state, bit by bit.

The rule is that of tarflow_fast/solvers/windows.py, which is run here on the same random passes.
"""

from types import SimpleNamespace

import pytest
import torch
from compare import same_bits

from tarflow_fast.net import Order
from tarflow_fast.ops.registry import triton_missing, triton_refuses
from tarflow_fast.solvers.windows import _Rows, guess_from_last
from tarflow_fast.transforms import find_transform

pytest.importorskip("triton")
pytestmark = pytest.mark.interpreter


@pytest.fixture
def where(device):
    if why_not := triton_refuses(device, torch.float32) or triton_missing():
        pytest.skip(why_not)
    return device


class Sides:
    """The same rows for the rule in Python and for the kernel, in random states."""

    def __init__(self, where, B, T, D, W, tolerance, transform, guided, seed):
        self.B, self.T, self.D, self.W, self.tolerance = B, T, D, W, tolerance
        self.draw = torch.Generator().manual_seed(seed)
        self.last, self.transform = T - 1, find_transform("test", transform)
        self.order = Order(T, places=torch.randperm(T, generator=self.draw).tolist())
        z = torch.randn(B, T, D, generator=self.draw)
        bijection = SimpleNamespace(order=self.order, transform=self.transform)
        self.rows = _Rows.__new__(_Rows)
        _Rows.__init__(self.rows, _Three(bijection), z, W, tolerance, guess_from_last, True)
        self.rows.stretched = torch.zeros(B, self.last)
        R = B * (1 + guided)
        self.device = {  # one place more than tokens, as in the workspace of passes
            "z": torch.cat([z, torch.full((B, 1, D), torch.nan)], dim=1).to(where),
            "x": torch.cat([z, torch.full((B, 1, D), 7.0)], dim=1).to(where),
            "order": torch.tensor([*self.order.places, 0], dtype=torch.int32, device=where),
            "state": torch.zeros(6, B, dtype=torch.int32, device=where),
            "starts": torch.zeros(2, R, dtype=torch.int32, device=where),
            "residual": torch.zeros(B, device=where),
            "history": torch.zeros(self.last, B, dtype=torch.int32, device=where),
            "left": torch.full((1,), B * self.last, dtype=torch.int32, device=where),
        }
        self.passes = 0

    def random(self, *shape):
        return torch.randn(*shape, generator=self.draw)

    def chance(self, share, *shape):
        return torch.rand(*shape, generator=self.draw) < share

    def one_pass(self, overflow=0.0):
        """A pass with random values, of which many are within the tolerance; both sides take it."""
        from tarflow_fast.kernels.triton.accept import accept

        rows, B, W, D = self.rows, self.B, self.W, self.D
        begin = rows.final.clamp(max=self.last - W)
        u = rows.x[torch.arange(B)[:, None], begin[:, None] + 1 + torch.arange(W)]
        near = self.chance(0.75, B, W, 1)
        step = torch.where(near, 0.9 if self.tolerance else 0.0, 50.0) * (self.random(B, W, D).clamp(-1, 1))
        step = step * torch.tensor(self.tolerance or 1.0)
        v = torch.where(near & (self.tolerance == 0), u, u + step)
        v = torch.where(self.chance(overflow, B, W, 1), torch.inf, v)
        parameters, stretched = 0.3 * self.random(B, W, len(self.transform.parts) * D), self.random(B, W)
        open_rows = (rows.final < self.last).nonzero()[:, 0]
        steps = SimpleNamespace(step=lambda *_: (v[open_rows], stretched[open_rows], parameters[open_rows]))
        gained = rows.advance(steps, open_rows, begin[open_rows], W)
        there = self.device["x"].device
        self.device["starts"][0] = self.device["starts"][1]
        accept(
            v=v.to(there), parameters=parameters.to(there), tolerance=self.tolerance,
            last=self.last, **self.device,
        )  # fmt: skip
        self.passes += 1
        return gained

    def assert_same(self, gained):
        rows, device = self.rows, {name: tensor.cpu() for name, tensor in self.device.items()}
        final, alone, idle, fallbacks, lost, _ = device["state"].long()
        assert torch.equal(final, rows.final) and torch.equal(lost.bool(), rows.lost)
        assert torch.equal(fallbacks, rows.fallbacks) and torch.equal(final < alone, rows.final < rows.alone)
        running = rows.final < self.last
        assert torch.equal(idle[running], rows.idle[running])
        assert device["left"].item() == int((self.last - rows.final).sum())
        assert torch.equal(device["history"][self.passes - 1].long(), gained)
        begin = rows.final.clamp(max=self.last - self.W).repeat(device["starts"].size(1) // self.B)
        assert torch.equal(device["starts"][1].long(), begin)
        x = device["x"][:, self.order.places]
        found = torch.arange(self.T) <= rows.final[:, None]
        assert same_bits(x[found], rows.x[found])
        torch.testing.assert_close(x, rows.x, rtol=1e-6, atol=1e-6, equal_nan=True)  # guesses, with an exp of its own
        assert (device["x"][:, -1] == 7).all()
        rows.x.copy_(x)  # so that rounding of guesses does not add up over passes
        residual = rows.residual.amax(dim=1)
        assert same_bits(device["residual"][~rows.lost], residual[~rows.lost])


class _Three(SimpleNamespace):
    """The three parts of a bijection, of a net that is not asked."""

    def __init__(self, parts):
        super().__init__(**vars(parts))

    def __iter__(self):
        return iter((None, self.transform, self.order))


CASES = {  # B, T, D, W, tolerance, transform, guided
    "affine": (5, 14, 6, 4, 1e-3, "affine", False),
    "guided": (4, 23, 3, 7, 1e-2, "affine", True),
    "shift": (3, 12, 5, 3, 1e-3, "shift", True),
    "exact": (4, 13, 2, 5, 0.0, "affine", False),
    "one-token": (2, 6, 4, 1, 1e-3, "affine", False),
    "whole": (3, 20, 192, 19, 1e-3, "affine", False),
    "one-row": (1, 17, 48, 16, 1e-3, "shift", False),
}


@pytest.mark.parametrize("overflow", [0.0, 0.1], ids=["", "overflows"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter computes with numpy
def test_the_kernel_does_what_the_rule_says(case, overflow, where):
    sides = Sides(where, *CASES[case], seed=len(case))
    while (sides.rows.final < sides.last).any():
        sides.assert_same(sides.one_pass(overflow))
    assert sides.passes <= sides.last
    if overflow:
        return
    # A pass too many changes nothing.
    before = {name: tensor.clone() for name, tensor in sides.device.items()}
    before["starts"][0] = before["starts"][1]
    sides.one_pass()
    assert all(same_bits(before[name].float(), sides.device[name].float()) for name in before)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_windows_that_gain_nothing_are_taken_one_by_one(where):
    """Values that jump in every pass gain one token each; after W such passes the row goes alone for W tokens."""
    sides = Sides(where, 3, 30, 2, 4, 1e-3, "affine", False, seed=1)
    sides.chance = lambda share, *shape: torch.zeros(*shape, dtype=torch.bool)
    slow = 0
    while (sides.rows.final < sides.last).any():
        slow += int((sides.rows.final < sides.rows.alone).any())
        sides.assert_same(sides.one_pass())
    assert sides.passes == 29 and slow > 8 and (sides.rows.fallbacks > 1).all()
