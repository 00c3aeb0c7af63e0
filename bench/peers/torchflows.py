"""torchflows' flows over images (torchflows/bijections/finite/multiscale/, residual/), at the library's own sizes."""

from __future__ import annotations

from torch import Tensor
from torchflows.bijections.finite.multiscale.architectures import AffineGlow, DeepSigmoidGlow, MultiscaleRealNVP
from torchflows.bijections.finite.residual.architectures import InvertibleResNet, ResFlow
from torchflows.flows import Flow

from peers.peer import Peer


class TorchflowsPeer(Peer):
    """A bijection of torchflows over images; `architecture` is its class there."""

    architecture: type

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__(shape)
        self.flow = Flow(self.architecture(shape))

    def log_prob(self, x: Tensor) -> Tensor:
        return self.flow.log_prob(x)

    def encode(self, x: Tensor) -> Tensor:
        return self.flow.bijection.forward(x)[0].flatten(1)

    def decode(self, z: Tensor) -> Tensor:
        return self.flow.bijection.inverse(z.view(-1, *self.shape))[0]

    def sample(self, n: int) -> Tensor:
        return self.flow.sample(n)

    def loss(self, x: Tensor) -> Tensor:
        return super().loss(x) + self.flow.regularization()


def _peer(architecture: type, words: str, estimated: bool = False) -> type[Peer]:
    names = {"__doc__": words, "architecture": architecture, "estimated": estimated}
    return type(architecture.__name__, (TorchflowsPeer,), names)


FAMILIES = {
    "RealNVP, multiscale": _peer(MultiscaleRealNVP, "RealNVP (arXiv 1605.08803) with its scales and convolutions."),
    "Glow": _peer(AffineGlow, "Glow (arXiv 1807.03039)."),
    "deep sigmoid Glow": _peer(
        DeepSigmoidGlow,
        "Glow with the mixtures of sigmoids of NAF (arXiv 1804.00779): the nearest kin of Flow++ there.",
    ),
    "invertible ResNet": _peer(InvertibleResNet, "i-ResNet (arXiv 1811.00995), a truncated series.", True),
    "residual flow": _peer(ResFlow, "Residual flow (arXiv 1906.02735), the roulette estimate.", True),
}
