"""zuko's masked autoregressive flows (zuko/flows/autoregressive.py, spline.py and neural.py)."""

from __future__ import annotations

import copy

import zuko
from torch import Tensor, nn

from peers.peer import Peer
from tarflow_fast import made


class ZukoPeer(Peer):
    """A flow of zuko over the pixels, in their order."""

    def __init__(self, shape: tuple[int, int, int], flow: nn.Module) -> None:
        super().__init__(shape)
        self.flow = flow

    def log_prob(self, x: Tensor) -> Tensor:
        return self.flow().log_prob(x.flatten(1))

    def encode(self, x: Tensor) -> Tensor:
        return self.flow().transform(x.flatten(1))

    def decode(self, z: Tensor) -> Tensor:
        return self.flow().transform.inv(z).view(-1, *self.shape)

    def sample(self, n: int) -> Tensor:
        return self.flow().sample((n,)).view(n, *self.shape)

    def one_sweep(self) -> Peer | None:
        other = copy.deepcopy(self)
        made.accelerate(other.flow)
        return other


class MAF(ZukoPeer):
    """Masked autoregressive flow (arXiv 1705.07057): five affine transforms, two hidden layers of 256."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__(shape, zuko.flows.MAF(_pixels(shape), transforms=5, hidden_features=(256, 256)))


class NSF(ZukoPeer):
    """Neural spline flow (arXiv 1906.04032), autoregressive: three transforms of 8 bins, two hidden layers of 128."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__(shape, zuko.flows.NSF(_pixels(shape), transforms=3, bins=8, hidden_features=(128, 128)))


class NAF(ZukoPeer):
    """Neural autoregressive flow (arXiv 1804.00779), whose univariate maps are monotone nets, inverted by bisection.

    It is the nearest relative of Flow++'s mixtures of logistics here whose log-density is right.
    """

    def __init__(self, shape: tuple[int, int, int]) -> None:
        net = {"hidden_features": (16, 16)}
        super().__init__(shape, zuko.flows.NAF(_pixels(shape), transforms=2, hidden_features=(128, 128), network=net))

    def one_sweep(self) -> Peer | None:
        """`made` does not know monotone nets."""
        return None


def _pixels(shape: tuple[int, int, int]) -> int:
    return shape[0] * shape[1] * shape[2]


FAMILIES = {"MAF": MAF, "neural spline flow": NSF, "neural autoregressive flow": NAF}
