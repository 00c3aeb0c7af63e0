"""shift: a shift for every element of a token, which keeps volumes (arXiv 2412.06329, section 3: `nvp=False`).

z = x - b;   x = z + b;   log |dx/dz| = 0
"""

from __future__ import annotations

from torch import Tensor

from tarflow_fast import ops

__all__ = ["Shift"]


class Shift:
    """Parameters of a token: b (D)."""

    name = "shift"
    parts = ("b",)  # of a token's parameters, D numbers each
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
        """As `Affine.forward`, parameters (B, T, D); the op `affine` takes a for 0 where there is none."""
        return ops.affine(x, parameters, flip=flip, backend=backend)

    def inverse(self, z: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """As `Affine.inverse`, parameters (..., D); the log-determinant is 0."""
        return (z + parameters).to(z.dtype), parameters.new_zeros(parameters.shape[:-1])
