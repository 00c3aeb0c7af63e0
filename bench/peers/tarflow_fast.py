"""This project's flows in the same form, with the affine transform."""

from __future__ import annotations

from torch import Tensor

from peers.peer import Peer
from tarflow_fast import TarFlow, TokenFlow


class Patches(Peer):
    """TarFlow (arXiv 2412.06329) on patches: 2 x 2 of images below 16 x 16, else 4 x 4; four blocks of two layers."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__(shape)
        C, H, W = shape
        patch, width = (2, 64) if H < 16 else (4, 128)
        self.flow = TarFlow(C, (H, W) if H != W else H, patch, width, 4, 2)

    def log_prob(self, x: Tensor) -> Tensor:
        return self.flow.log_prob(x)

    def encode(self, x: Tensor) -> Tensor:
        return self.flow(x)[0].flatten(1)

    def decode(self, z: Tensor) -> Tensor:
        return self.flow.reverse(z.view(-1, *self.flow.var.shape))

    def sample(self, n: int) -> Tensor:
        return self.flow.sample(n)

    def begin(self, x: Tensor) -> None:
        """Nothing starts from data."""


class Rows(Peer):
    """TokenFlow on the rows of an image as tokens, T = H and D = C * W, without patches; four blocks of two layers."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__(shape)
        C, H, W = shape
        self.flow = TokenFlow(H, C * W, 64 if H < 16 else 128, 4, 2)

    def log_prob(self, x: Tensor) -> Tensor:
        return self.flow.log_prob(self._tokens(x))

    def encode(self, x: Tensor) -> Tensor:
        return self.flow(self._tokens(x))[0].flatten(1)

    def decode(self, z: Tensor) -> Tensor:
        return self._images(self.flow.inverse(z.view(-1, *self.flow.var.shape))[0])

    def sample(self, n: int) -> Tensor:
        return self._images(self.flow.sample(n))

    def begin(self, x: Tensor) -> None:
        """Nothing starts from data."""

    def _tokens(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).reshape(len(x), *self.flow.var.shape)

    def _images(self, tokens: Tensor) -> Tensor:
        C, H, W = self.shape
        return tokens.view(-1, H, C, W).transpose(1, 2).contiguous()


FAMILIES = {"TarFlow": Patches, "TokenFlow": Rows}
