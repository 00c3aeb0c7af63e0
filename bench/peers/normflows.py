"""normflows' RealNVP, Glow and residual flow (normflows/flows/affine/, mixing.py, residual.py, nets/lipschitz.py)."""

from __future__ import annotations

import math

import normflows
import torch
from torch import Tensor, nn

from peers.peer import Peer

HIDDEN = 256
# Of ActNorm: one scale and one shift for all pixels, as for images of one channel. One for each pixel starts from the
# first batch, where pixels that are always black are nearly constant, and then an image with ink there overflows.
SCALES = 1


class NormflowsPeer(Peer):
    """Layers of normflows over the pixels as a vector."""

    def __init__(self, shape: tuple[int, int, int], layers: list[nn.Module]) -> None:
        super().__init__(shape)
        prior = normflows.distributions.DiagGaussian(self.dims, trainable=False)
        self.flow = normflows.NormalizingFlow(prior, layers)

    def log_prob(self, x: Tensor) -> Tensor:
        return self.flow.log_prob(x.flatten(1).clone())  # a clone: its residual blocks ask their input for gradients

    def encode(self, x: Tensor) -> Tensor:
        return self.flow.inverse_and_log_det(x.flatten(1).clone())[0]

    def decode(self, z: Tensor) -> Tensor:
        return self.flow.forward_and_log_det(z.clone())[0].view(-1, *self.shape)

    def sample(self, n: int) -> Tensor:
        return self.flow.sample(n)[0].view(n, *self.shape)


class RealNVP(NormflowsPeer):
    """RealNVP (arXiv 1605.08803) over vectors: eight masked affine couplings with fully connected nets, actnorm."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        D, layers = math.prod(shape), []
        mask = (torch.arange(D) % 2).float()
        for number in range(8):
            t = normflows.nets.MLP([D, HIDDEN, HIDDEN, D], init_zeros=True)
            s = normflows.nets.MLP([D, HIDDEN, HIDDEN, D], init_zeros=True, output_fn="tanh", output_scale=3.0)
            layers.append(normflows.flows.MaskedAffineFlow(mask if number % 2 else 1 - mask, t, s))
            layers.append(normflows.flows.ActNorm(SCALES))
        super().__init__(shape, layers)


class ResidualFlow(NormflowsPeer):
    """Residual flow (arXiv 1906.02735): eight Lipschitz blocks with the roulette estimate of the log-determinant."""

    estimated = True

    def __init__(self, shape: tuple[int, int, int]) -> None:
        D, layers = math.prod(shape), []
        for _ in range(8):
            net = normflows.nets.LipschitzMLP([D, HIDDEN, HIDDEN, D], init_zeros=True, lipschitz_const=0.9)
            layers += [normflows.flows.Residual(net, reduce_memory=True), normflows.flows.ActNorm(SCALES)]
        super().__init__(shape, layers)

    def begin(self, x: Tensor) -> None:
        normflows.utils.update_lipschitz(self.flow, 50)
        super().begin(x)

    def after_step(self) -> None:
        normflows.utils.update_lipschitz(self.flow, 5)

    def finish(self) -> None:
        normflows.utils.update_lipschitz(self.flow, 50)


class Glow(Peer):
    """Glow (arXiv 1807.03039): two scales of eight blocks (actnorm, 1 x 1 convolution, coupling), 64 channels."""

    scales, blocks, hidden = 2, 8, 64

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__(shape)
        C, H, W = shape
        L = self.scales
        priors, layers, merges, self.latents = [], [], [], []
        for i in range(L):  # from the coarsest scale to the images
            inner = C * 2 ** (L + 1 - i)
            blocks = [normflows.flows.GlowBlock(inner, self.hidden) for _ in range(self.blocks)]
            layers.append([*blocks, normflows.flows.Squeeze()])
            scale = 2 ** (L - i)
            latent = (C * 2 ** (L - i), H // scale, W // scale) if i else (C * 2 ** (L + 1), H // scale, W // scale)
            priors.append(normflows.distributions.DiagGaussian(latent, trainable=False))
            self.latents.append(latent)
            if i:
                merges.append(normflows.flows.Merge())
        self.flow = normflows.MultiscaleFlow(priors, layers, merges, class_cond=False)

    def log_prob(self, x: Tensor) -> Tensor:
        return self.flow.log_prob(x, None)

    def encode(self, x: Tensor) -> Tensor:
        return torch.cat([z.flatten(1) for z in self.flow.inverse_and_log_det(x)[0]], dim=1)

    def decode(self, z: Tensor) -> Tensor:
        parts = z.split([math.prod(latent) for latent in self.latents], dim=1)
        latents = [part.reshape(-1, *latent) for part, latent in zip(parts, self.latents, strict=True)]
        return self.flow.forward_and_log_det(latents)[0]

    def sample(self, n: int) -> Tensor:
        return self.flow.sample(n)[0]


FAMILIES = {"RealNVP": RealNVP, "Glow": Glow, "residual flow": ResidualFlow}
