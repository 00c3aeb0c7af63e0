"""The one form in which flows of all libraries are trained, checked and timed."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class Peer(nn.Module):
    """A flow over images x (B, C, H, W), real numbers, with noise z (B, C * H * W) under a standard normal prior.

    estimated: whether `log_prob` is a random estimate, so that only its mean can be checked.
    """

    estimated = False

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.shape, self.dims = shape, math.prod(shape)

    def log_prob(self, x: Tensor) -> Tensor:
        """The library's own log p(x): (B,), nats."""
        raise NotImplementedError

    def encode(self, x: Tensor) -> Tensor:
        """x to z by the library's own code, differentiable in x."""
        raise NotImplementedError

    def decode(self, z: Tensor) -> Tensor:
        """The library's own inverse of `encode`."""
        raise NotImplementedError

    def sample(self, n: int) -> Tensor:
        """n images, as the library draws them."""
        raise NotImplementedError

    def loss(self, x: Tensor) -> Tensor:
        """What training minimises: nats a row, the mean over the rows."""
        return -self.log_prob(x).mean()

    def begin(self, x: Tensor) -> None:
        """What the library wants done once before training, with the first batch: layers that start from data do."""
        with torch.no_grad():
            self.log_prob(x)

    def after_step(self) -> None:
        """What the library wants done after every step of the optimizer."""

    def finish(self) -> None:
        """What the library wants done after training."""

    def one_sweep(self) -> Peer | None:
        """The same flow with `tarflow_fast.made.accelerate`, where that knows it."""
        return None


def log_normal(z: Tensor) -> Tensor:
    """log N(z; 0, 1) of z (B, D): (B,)."""
    return -0.5 * (z.square() + math.log(2 * math.pi)).sum(dim=1)
