"""affine: a scale and a shift for every element of a token (arXiv 2412.06329, section 2.1).

z = (x - b) exp(-a);   x = z exp(a) + b;   log |dx/dz| = sum of a over D
"""

from __future__ import annotations

import torch
from torch import Tensor

from tarflow_fast import ops

__all__ = ["Affine"]


class Affine:
    """Parameters of a token: a (D), then b (D)."""

    name = "affine"
    parts = ("a", "b")  # of a token's parameters, D numbers each
    guided = True

    def __str__(self) -> str:
        return self.name

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other)

    def __hash__(self) -> int:
        return hash(self.name)

    def forward(
        self, x: Tensor, parameters: Tensor, flip: bool = False, backend: str = "auto"
    ) -> tuple[Tensor, Tensor]:
        """A whole sequence, the parameters shifted by one token: the op `affine`.

        x (B, T, D), parameters (B, T, 2D) in net order -> z (B, T, D), and log |det dz/dx| (B,), nats.
        """
        return ops.affine(x, parameters, flip=flip, backend=backend)

    def inverse(self, z: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens by themselves: z (..., D), parameters (..., 2D) float32 or wider, of the same tokens.

        Returns x (..., D) in z's dtype, and log |dx/dz| (...,), the sum of a over D.
        """
        a, b = parameters.chunk(2, dim=-1)
        return (z * torch.exp(a) + b).to(z.dtype), a.sum(dim=-1)
