"""The sequential solver: one token after another, with any engine's passes.

    x_{p(0)} = z_{p(0)};   x_{p(i+1)} = transform^-1(z_{p(i+1)}; net(x_{p(0)} .. x_{p(i)}))     (arXiv 2412.06329, 2.1)

p is the order in which the net sees the tokens. The last token needs no pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from tarflow_fast.dtypes import wide_dtype
from tarflow_fast.transforms import Bijection

__all__ = ["Passes", "solve_sequentially"]


class Passes(Protocol):
    """What an engine opens for one block and one batch."""

    def run(self, tokens: Tensor, position: int) -> Tensor:
        """The net on W tokens (B, W, D) that follow those before `position`: guided parameters (B, W, P D)."""


def solve_sequentially(
    passes: Passes, bijection: Bijection, z: Tensor, on_token: Callable[[], None] | None = None
) -> tuple[Tensor, Tensor]:
    """z (B, T, D) -> x (B, T, D) in z's dtype, and log |det dx/dz| (B,), nats, float32 or wider.

    No tensor is written in place, so that the result can be differentiated where the passes can.
    on_token: called once for every token solved.
    """
    _, transform, order = bijection
    T, places = z.size(1), order.places
    log_det = torch.zeros(z.size(0), dtype=wide_dtype(z), device=z.device)
    found = [z[:, places[0]]]
    for i in range(T - 1):
        parameters = passes.run(found[i][:, None], i)[:, 0]
        x, stretched = transform.inverse(z[:, places[i + 1]], parameters)
        found.append(x)
        log_det = log_det + stretched
        if on_token is not None:
            on_token()
    return torch.stack([found[i] for i in order.inverse], dim=1), log_det
