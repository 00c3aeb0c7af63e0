"""Transforms that map every number of a token by itself, written in PyTorch: an increasing function with parameters.

z_0 = x_0;   z_{i+1} = f(x_{i+1}; parameters of token i);   log |det dz/dx| = the sum of log f' over T and D
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from tarflow_fast.dtypes import wide_dtype
from tarflow_fast.ops.registry import asked_for

__all__ = ["Elementwise", "soft_clip"]

LIMIT = 7.0  # of a soft-clipped log-scale: scales stay between e^-7 and e^7, about 1/1100 and 1100


def soft_clip(u: Tensor, limit: float = LIMIT) -> Tensor:
    """u / (1 + |u| / limit): u near 0, and below `limit` in size everywhere, so that exp neither overflows nor vanishes
    whatever a net gives."""
    return u / (1 + u.abs() / limit)


class Elementwise(ABC):
    """What such transforms have in common: the shift by one token, types, and sums.

    A subclass has a `name`, the names of the `parts` of a token's parameters (D numbers each), and the two maps.
    """

    name: str
    parts: tuple[str, ...]
    guided = False  # no publication says what guidance would do to these parameters

    @abstractmethod
    def encode(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """x (..., D), parameters (..., P, D), float32 or wider -> z (..., D), and log dz/dx (..., D)."""

    @abstractmethod
    def decode(self, z: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """z (..., D), parameters (..., P, D), float32 or wider -> x (..., D), and log dx/dz (..., D)."""

    def forward(
        self, x: Tensor, parameters: Tensor, flip: bool = False, backend: str = "auto"
    ) -> tuple[Tensor, Tensor]:
        """A whole sequence, the parameters shifted by one token, as `Affine.forward` with P D parameters a token.

        x (B, T, D), parameters (B, T, P D) in net order -> z (B, T, D) in x's dtype, and log |det dz/dx| (B,), nats,
        float32 or wider. flip: x is in reverse of the net's order.

        Raises:
            RuntimeError: a backend other than PyTorch was asked for by name.
        """
        if (asked := asked_for(backend)) not in ("auto", "torch"):
            raise RuntimeError(f"{self.name}: backend {asked!r} cannot run: its density is computed by PyTorch alone")
        wide = torch.promote_types(wide_dtype(x), wide_dtype(parameters))
        seen = (x.flip(1) if flip else x).to(wide)
        known = parameters[:, :-1].to(wide).unflatten(-1, (len(self.parts), x.size(-1)))
        later, stretched = self.encode(seen[:, 1:], known)
        z = torch.cat([seen[:, :1], later], dim=1)
        return (z.flip(1) if flip else z).to(x.dtype), stretched.sum(dim=(1, 2))

    def inverse(self, z: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens by themselves, as `Affine.inverse`: z (..., D), parameters (..., P D) of the same tokens.

        It is computed in float64 whatever the types are: then x is right to the rounding of z's dtype.
        Returns x (..., D) in z's dtype, and log |dx/dz| (...,), the sum over D, in the parameters' dtype.
        """
        wide = parameters.double().unflatten(-1, (len(self.parts), z.size(-1)))
        x, stretched = self.decode(z.double(), wide)
        return x.to(z.dtype), stretched.sum(dim=-1).to(parameters.dtype)
