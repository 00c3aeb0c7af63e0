"""logistic_mixture: the logit of the CDF of a mixture of logistics, then an affine map (Flow++, arXiv 1902.00275, 3.2).

F(x) = sum_k pi_k sigmoid((x - m_k) exp(-s_k));   u = logit F(x);   z = (u - b) exp(-a)
dF/dx = sum_k pi_k exp(-s_k) sigmoid'((x - m_k) exp(-s_k));   log dz/dx = log dF/dx - log F - log(1 - F) - a

Parameters that are all 0 make it the identity: K equal logistics are one, and the logit undoes it. a and s_k are soft
clipped (u / (1 + |u| / 7)), and pi is a softmax, so that every finite parameter gives a finite map. Nothing is computed
from F or 1 - F themselves, only from their logarithms: the map keeps its digits in both tails, where it is linear.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tarflow_fast.transforms.elementwise import Elementwise, soft_clip
from tarflow_fast.transforms.implicit import solve_increasing
from tarflow_fast.validate import check_positive_int

__all__ = ["LogisticMixture"]


class _Mixture(NamedTuple):
    """log pi, means and log-scales of K logistics: (..., K, D) each."""

    log_weight: Tensor
    mean: Tensor
    log_scale: Tensor

    def shares(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of x (..., D): t (..., K, D), the numbers that the sigmoids take; logit F (..., D); log p and log q.

        p_k = pi_k sigmoid(t_k) / F and q_k = pi_k sigmoid(-t_k) / (1 - F) are the shares of the components in both
        tails. (Their logarithms keep digits that log dF/dx - log F - log(1 - F) loses in the tails.)
        """
        t = (x.unsqueeze(-2) - self.mean) * torch.exp(-self.log_scale)
        below, above = self.log_weight + logsigmoid(t), self.log_weight + logsigmoid(-t)
        log_F, log_rest = below.logsumexp(-2, keepdim=True), above.logsumexp(-2, keepdim=True)
        return t, (log_F - log_rest).squeeze(-2), below - log_F, above - log_rest

    def logit(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """u = logit F(x), and log du/dx; du/dx = sum_k exp(-s_k) (p_k sigmoid(-t_k) + q_k sigmoid(t_k))."""
        t, u, log_p, log_q = self.shares(x)
        rates = torch.cat([log_p + logsigmoid(-t) - self.log_scale, log_q + logsigmoid(t) - self.log_scale], dim=-2)
        return u, rates.logsumexp(-2)

    def solve(self, u: Tensor) -> Tensor:
        """x with logit F(x) = u, without gradients. A component alone would have m_k + u exp(s_k); the x of a mixture
        lies between the least and the largest of these."""
        alone = self.mean + u.unsqueeze(-2) * torch.exp(self.log_scale)
        start = (self.log_weight.exp() * alone).sum(-2)

        def function(x: Tensor) -> tuple[Tensor, Tensor]:
            value, log_slope = self.logit(x)
            return value, log_slope.exp()

        return solve_increasing(function, u, alone.amin(-2), alone.amax(-2), start)


class _Inverse(torch.autograd.Function):
    """x of u, with the gradients of the implicit function logit F(x; theta) = u.

    dx/du = 1 / (du/dx), and dx/dtheta = -(du/dtheta) / (du/dx); they are plain operations on x, so that they have
    gradients in their turn.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, u: Tensor, *theta: Tensor) -> Tensor:
        x = _Mixture(*theta).solve(u)
        ctx.save_for_backward(x, *theta)
        return x

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, ...]:
        x, *theta = ctx.saved_tensors
        mixture = _Mixture(*theta)
        t, _, log_p, log_q = mixture.shares(x)
        rate = torch.exp(log_p + logsigmoid(-t)) + torch.exp(log_q + logsigmoid(t))  # du/dt_k
        inner = rate * torch.exp(-mixture.log_scale)
        grad_u = grad / inner.sum(-2)
        pulled = grad_u.unsqueeze(-2)
        return grad_u, -pulled * (log_p.exp() - log_q.exp()), pulled * inner, pulled * rate * t


@dataclass(frozen=True)
class LogisticMixture(Elementwise):
    """Parameters of a token: a, b, then K log-weights (up to a constant), K means and K log-scales, D numbers each.

    Args:
        components: K.

    Raises:
        TypeError, ValueError: components is no int of at least 1.
    """

    components: int = 8
    name = "logistic_mixture"

    def __post_init__(self) -> None:
        object.__setattr__(self, "components", check_positive_int("LogisticMixture", "components", self.components))

    def __str__(self) -> str:
        return f"{self.name}:{self.components}"

    @property
    def parts(self) -> tuple[str, ...]:
        kinds = ("log_weight", "mean", "log_scale")
        return ("scale", "shift", *(f"{kind}_{k}" for kind in kinds for k in range(self.components)))

    def _read(self, parameters: Tensor) -> tuple[Tensor, Tensor, _Mixture]:
        K = self.components
        a, b, weight, mean, log_scale = parameters.split([1, 1, K, K, K], dim=-2)
        mixture = _Mixture(weight.log_softmax(-2), mean, soft_clip(log_scale))
        return soft_clip(a.squeeze(-2)), b.squeeze(-2), mixture

    def encode(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        a, b, mixture = self._read(parameters)
        u, log_slope = mixture.logit(x)
        return (u - b) * torch.exp(-a), log_slope - a

    def decode(self, z: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        a, b, mixture = self._read(parameters)
        x = _Inverse.apply(z * torch.exp(a) + b, *mixture)
        return x, a - mixture.logit(x)[1]
