"""spline: an affine map, then a monotone rational-quadratic spline with linear tails (arXiv 1906.04032, section 3).

u = (x - b) exp(-a);   z = s(u) between -4 and 4, z = u outside;   log dz/dx = log s'(u) - a

s passes through K + 1 knots (u_k, z_k), has the derivative d_k there, and is a quotient of quadratics between two knots
(equation 4): with t = (u - u_k) / w, bin width w, bin height h and r = h / w,

    s = z_k + h (r t^2 + d_k t (1 - t)) / (r + (d_{k+1} + d_k - 2 r) t (1 - t))

Widths and heights are shares of 8 by a softmax, at least 1/1000 each. d is 1 at both ends, as the tails are. Inside it
is the exponential of a soft-clipped parameter, where the paper has a softplus, so that parameters that are all 0 make
the identity. a is soft clipped as well (u / (1 + |u| / 7)). So every finite parameter gives a finite map.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tarflow_fast.transforms.elementwise import Elementwise, soft_clip
from tarflow_fast.validate import check_positive_int

__all__ = ["Spline"]

BOUND = 4.0  # of the knots: one normal number in 16,000 lies outside
LEAST = 1e-3  # of a bin's share of the interval
MOST_BINS = 64  # so that the least shares leave most of the interval


class _Knots(NamedTuple):
    """Knots in u and in z, and derivatives there: (..., K + 1, D) each."""

    u: Tensor
    z: Tensor
    slope: Tensor

    def bin_of(self, value: Tensor, edges: Tensor) -> _Bin:
        """The bin of each value (..., D) among `edges`, which are self.u or self.z."""
        number = (value.unsqueeze(-2) >= edges[..., 1:-1, :]).sum(-2, keepdim=True)

        def take(each: Tensor, step: int) -> Tensor:
            shape = number.shape[:-2] + each.shape[-2:]
            return each.expand(shape).gather(-2, number + step).squeeze(-2)

        (u, z, first), (u_next, z_next, last) = ([take(each, step) for each in self] for step in (0, 1))
        return _Bin(u, z, u_next - u, z_next - z, first, last)


class _Bin(NamedTuple):
    """Of each number: its bin's lower knot, width, height, and the derivatives at both ends."""

    u: Tensor
    z: Tensor
    width: Tensor
    height: Tensor
    first: Tensor
    last: Tensor

    def value(self, t: Tensor) -> Tensor:
        """s at the share t of the bin."""
        r, mixed = self.height / self.width, t * (1 - t)
        return self.z + self.height * (r * t * t + self.first * mixed) / (r + (self.first + self.last - 2 * r) * mixed)

    def log_slope(self, t: Tensor) -> Tensor:
        """log s' there: equation 5."""
        r, mixed, left = self.height / self.width, t * (1 - t), 1 - t
        rise = self.last * t * t + 2 * r * mixed + self.first * left * left
        return 2 * r.log() + rise.log() - 2 * (r + (self.first + self.last - 2 * r) * mixed).log()

    def share(self, z: Tensor) -> Tensor:
        """t with s = z: the root of a quadratic (equations 6 to 8), in the form in which nothing cancels."""
        r, rise = self.height / self.width, z - self.z
        bend = rise * (self.first + self.last - 2 * r)
        a, b, c = self.height * (r - self.first) + bend, self.height * self.first - bend, -r * rise
        root = (b * b - 4 * a * c).clamp(min=torch.finfo(z.dtype).tiny).sqrt()
        return 2 * c / (-b - root)


@dataclass(frozen=True)
class Spline(Elementwise):
    """Parameters of a token: a, b, then K widths, K heights and K - 1 derivatives as a net gives them, D numbers each.

    Args:
        bins: K, from 2 to 64.

    Raises:
        TypeError, ValueError: bins is no such int.
    """

    bins: int = 8
    name = "spline"

    def __post_init__(self) -> None:
        bins = check_positive_int("Spline", "bins", self.bins, 2)
        if bins > MOST_BINS:
            raise ValueError(f"Spline: bins must be <= {MOST_BINS}, got {bins}")
        object.__setattr__(self, "bins", bins)

    def __str__(self) -> str:
        return f"{self.name}:{self.bins}"

    @property
    def parts(self) -> tuple[str, ...]:
        K = self.bins
        counts = {"width": K, "height": K, "derivative": K - 1}
        return ("scale", "shift", *(f"{kind}_{k}" for kind, count in counts.items() for k in range(count)))

    def _read(self, parameters: Tensor) -> tuple[Tensor, Tensor, _Knots]:
        K = self.bins
        a, b, width, height, derivative = parameters.split([1, 1, K, K, K - 1], dim=-2)
        ends = torch.ones_like(a)
        slope = torch.cat([ends, soft_clip(derivative).exp(), ends], dim=-2)
        return soft_clip(a.squeeze(-2)), b.squeeze(-2), _Knots(_edges(width), _edges(height), slope)

    def encode(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        a, b, knots = self._read(parameters)
        u = (x - b) * torch.exp(-a)
        inside, safe = _inside(u)
        bin = knots.bin_of(safe, knots.u)
        t = (safe - bin.u) / bin.width
        return torch.where(inside, bin.value(t), u), torch.where(inside, bin.log_slope(t), 0) - a

    def decode(self, z: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        a, b, knots = self._read(parameters)
        inside, safe = _inside(z)
        bin = knots.bin_of(safe, knots.z)
        t = bin.share(safe)
        u = torch.where(inside, bin.u + t * bin.width, z)
        return u * torch.exp(a) + b, a - torch.where(inside, bin.log_slope(t), 0)


def _edges(raw: Tensor) -> Tensor:
    """(..., K, D) parameters to K + 1 increasing knots from -4 to 4."""
    share = LEAST + (1 - LEAST * raw.size(-2)) * raw.softmax(-2)
    inner = 2 * BOUND * share[..., :-1, :].cumsum(-2) - BOUND
    end = torch.full_like(raw[..., :1, :], BOUND)
    return torch.cat([-end, inner, end], dim=-2)


def _inside(value: Tensor) -> tuple[Tensor, Tensor]:
    """Which numbers lie between the tails, and the numbers with 0 in place of those that do not."""
    inside = value.abs() < BOUND
    return inside, torch.where(inside, value, 0)
