"""Whether a peer's log-density is what it claims: the truth is log N(z; 0, 1) + log |det dz/dx|, by autograd."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from peers.peer import Peer, log_normal
from torch import Tensor

DRAWS = 64  # of a log-density that is estimated
ESTIMATE = 0.01  # the bias that an estimate may have, bits a dimension, beyond four standard errors
EXACT = 1e-6  # the relative error that a log-density in float64 may have
TRIP = 1e-2  # the largest |decode(encode(x)) - x| in float64, in standard deviations of pixels: some search for it
_ROWS = 112  # of the Jacobian, at a time


@dataclass(frozen=True)
class Checked:
    """error: the largest difference of log p from the truth, nats (of the mean, for an estimate): in float64.
    single: the same of the peer as it is, in float32.  spread: the standard error of an estimate, nats.
    trip: the largest |decode(encode(x)) - x|.  why: what is wrong with the peer, or "".
    """

    error: float
    single: float
    spread: float
    trip: float
    why: str


def check(peer: Peer, x: Tensor) -> Checked:
    """Checks the peer on images x (B, C, H, W), float32. The peer itself is left as it was, in evaluation mode."""
    peer.eval()
    double = copy.deepcopy(peer).double()
    wide = x.double()
    truth = true_log_prob(double, wide)
    with torch.no_grad():
        trip = (double.decode(double.encode(wide)) - wide).abs().max().item()
        draws = DRAWS if peer.estimated else 1
        found = torch.stack([double.log_prob(wide) for _ in range(draws)])
        single = torch.stack([peer.log_prob(x).double() for _ in range(draws)]).mean(dim=0)
    error = (found.mean(dim=0) - truth).abs()
    spread = found.std(dim=0) / draws**0.5 if peer.estimated else torch.zeros_like(error)
    allowed = 4 * spread + ESTIMATE * peer.dims * math.log(2) if peer.estimated else EXACT * (1 + truth.abs())
    why = []
    if not bool((error <= allowed).all()):  # a NaN is wrong too
        why.append(f"its log-density is {error.max().item():.3g} nats from autograd's")
    if not trip <= TRIP:
        why.append(f"its inverse comes back {trip:.1g} from where it started")
    return Checked(error.max().item(), (single - truth).abs().max().item(), spread.max().item(), trip, "; ".join(why))


def true_log_prob(peer: Peer, x: Tensor) -> Tensor:
    """log N(z; 0, 1) + log |det dz/dx| of z = encode(x), row by row, by D backward passes: (B,)."""
    found = []
    for image in x.detach():
        parts = []
        for units in torch.eye(peer.dims, dtype=x.dtype).split(_ROWS):
            copies = image.expand(len(units), *peer.shape).clone().requires_grad_()
            z = peer.encode(copies)
            (rows,) = torch.autograd.grad((z * units).sum(), copies)  # row i of the Jacobian from copy i
            parts.append(rows.flatten(1))
        found.append(log_normal(z[:1].detach())[0] + torch.linalg.slogdet(torch.cat(parts)).logabsdet)
    return torch.stack(found)
