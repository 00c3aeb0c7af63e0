"""The noise that images get in training, and the flow behind it as one module, so that both learn from one loss."""

from __future__ import annotations

import torch
from torch import nn

from tarflow_fast import data
from tarflow_fast.data import UniformDequantizer, VariationalDequantizer
from tarflow_fast.model import TarFlow
from tarflow_fast.training.config import TrainConfig

__all__ = ["NoisyFlow"]


class NoisyFlow(nn.Module):
    """Images and what is drawn for them -> the flow's noise and log-determinants, and what the dequantiser takes off.

        gaussian:  x = images in [-1, 1] + noise_std * noise, noise normal
        uniform:   x = 2 (images + u) / levels - 1, u drawn by a dequantiser;   -ELBO = -log p(x) + log q(u | images)

    flow: the model.  config: resolved.  levels: grey levels of the data.  dequantizer: one to go on with; None: a fresh
    one, where config asks for one that learns.
    """

    def __init__(
        self, flow: TarFlow, config: TrainConfig, levels: int, dequantizer: VariationalDequantizer | None = None
    ) -> None:
        super().__init__()
        self.flow, self.levels, self.noise_std = flow, levels, config.noise_std
        self.gaussian = config.noise_type == "gaussian"
        if config.dequantize == "variational":
            self.dequantizer = VariationalDequantizer.of(flow) if dequantizer is None else dequantizer
        else:
            self.dequantizer = UniformDequantizer()
        self.dequantizer.to(flow.var.device)

    @property
    def learned(self) -> VariationalDequantizer | None:
        """The dequantiser, where it has parameters."""
        return self.dequantizer if isinstance(self.dequantizer, VariationalDequantizer) else None

    def draw(self, shape: tuple[int, ...], generator: torch.Generator, device: torch.device) -> torch.Tensor:
        """Standard normal numbers for gaussian noise, uniform ones for dequantisation."""
        make = torch.randn if self.gaussian else torch.rand
        return make(shape, generator=generator, device=device)

    def add(self, images: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The flow's input (B, C, H, W), and log q (B,) in nats, 0 where nothing is learned."""
        if self.gaussian:
            return data.to_unit(images, self.levels) + self.noise_std * noise, noise.new_zeros(len(noise))
        u, log_q = self.dequantizer(images, noise, self.levels)
        return data.dequantize(images, u, self.levels), log_q

    def forward(
        self, images: torch.Tensor, noise: torch.Tensor, y: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """z (B, T, D); log |det dz/dx| and log q of each image divided by its dimensions, (B,) each."""
        x, log_q = self.add(images, noise)
        z, _, logdets = self.flow(x, y)
        return z, logdets, log_q / x[0].numel()
