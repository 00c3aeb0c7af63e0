"""nflows' MAF and its neural spline flow with couplings (nflows/transforms/autoregressive.py and coupling.py)."""

from __future__ import annotations

import copy
import math

import torch
from nflows import distributions, flows, nn, transforms
from torch import Tensor

from peers.peer import Peer
from tarflow_fast import made


class NflowsPeer(Peer):
    """Transforms of nflows over the pixels, in their order."""

    def __init__(self, shape: tuple[int, int, int], parts: list[torch.nn.Module]) -> None:
        super().__init__(shape)
        self.transform = transforms.CompositeTransform(parts)
        self.flow = flows.Flow(self.transform, distributions.StandardNormal([self.dims]))

    def log_prob(self, x: Tensor) -> Tensor:
        return self.flow.log_prob(x.flatten(1))

    def encode(self, x: Tensor) -> Tensor:
        return self.flow.transform_to_noise(x.flatten(1))

    def decode(self, z: Tensor) -> Tensor:
        return self.transform.inverse(z)[0].view(-1, *self.shape)

    def sample(self, n: int) -> Tensor:
        return self.flow.sample(n).view(n, *self.shape)


class MAF(NflowsPeer):
    """Masked autoregressive flow (arXiv 1705.07057): five affine transforms with residual nets of two blocks of 256."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        D, parts = math.prod(shape), []
        for _ in range(5):
            parts.append(transforms.MaskedAffineAutoregressiveTransform(D, 256, num_blocks=2))
            parts.append(transforms.ReversePermutation(D))
        super().__init__(shape, parts)

    def one_sweep(self) -> Peer | None:
        other = copy.deepcopy(self)
        made.accelerate(other.flow)
        return other


class CouplingNSF(NflowsPeer):
    """Neural spline flow (arXiv 1906.04032) with couplings: six transforms of 8 bins, residual nets of two blocks."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        D, parts = math.prod(shape), []
        mask = torch.arange(D) % 2 == 0
        for number in range(6):
            parts.append(
                transforms.PiecewiseRationalQuadraticCouplingTransform(
                    mask if number % 2 else ~mask,
                    lambda n, m: nn.nets.ResidualNet(n, m, hidden_features=128, num_blocks=2),
                    num_bins=8,
                    tails="linear",
                    tail_bound=5.0,
                )
            )
        super().__init__(shape, parts)


FAMILIES = {"MAF": MAF, "neural spline flow, coupling": CouplingNSF}
