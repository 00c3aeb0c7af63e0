"""When each unit of a masked net is final, read off the masks.

A hidden unit whose inputs are all known is final. Feature i becomes known at step s_i + 1, where s_i is the step at
which the last of its parameters is final; a unit is final at the last step of the inputs it sees, and at step 0 when it
sees none. So one sweep over the steps computes each unit once. Nothing is assumed about how the masks were made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tarflow_fast.made.net import Layer, Made, Unknown

__all__ = ["Schedule", "masks_of", "standing"]


@dataclass(frozen=True, eq=False)
class Schedule:
    """The order in which the units of a net become final.

    masks: of all layers, (units, inputs) of bool, without the columns of the context.
    steps: S; a net in which every feature sees all those before it has D.
    places: for x and for each layer, its units in the order of their steps, (n,) int64. Units of one step keep their
        order, and so do the P parameters of one feature.
    starts: for x and for each layer, the number of units before each step, S + 1 numbers. Features count at the step
        at which their parameters are final: those known at step s are the first starts[0][s].
    """

    masks: tuple[Tensor, ...]
    steps: int
    places: tuple[Tensor, ...]
    starts: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, made: Made, masks: Sequence[Tensor]) -> Schedule:
        """Of a net with these masks.

        Raises:
            Unknown: the parameters of a feature depend on itself, directly or through others.
        """
        D = made.features
        # For each vector (units, D): the features that a unit depends on.
        sees = [torch.eye(D, dtype=torch.bool, device="cpu")]
        for layer, mask in zip(made.layers, masks, strict=True):
            seen = mask.float() @ sees[layer.source].float() > 0
            sees.append(seen if layer.residual is None else seen | sees[layer.residual])
        final = _generations(sees[-1].view(D, -1, D).any(1))
        steps = int(final.max()) + 1
        known = [(each * (final + 1)).amax(1) for each in sees[1:-1]]
        known = [final, *known, final.repeat_interleave(made.univariate.parameters)]
        counts = [torch.bincount(each, minlength=steps)[:steps].cumsum(0).tolist() for each in known]
        places = [torch.argsort(each, stable=True) for each in known]
        return cls(tuple(masks), steps, tuple(places), tuple((0, *each) for each in counts))


def _generations(depends: Tensor) -> Tensor:
    """For each feature the length of the longest chain of features before it, from depends[i, j]: i needs j."""
    waits_for = depends.sum(1)  # how many features are not known yet; below 0 for those that are known themselves
    step = torch.zeros_like(waits_for)
    for s in range(len(step)):
        ready = (waits_for == 0).nonzero()[:, 0]
        if not len(ready):
            break
        step[ready] = s
        waits_for -= depends[:, ready].sum(1)
        waits_for[ready] = -1
    if (waits_for >= 0).any():
        raise Unknown("masks that are not autoregressive")
    return step


def standing(places: Tensor) -> Tensor:
    """Where each unit stands, from which unit stands at each place."""
    return torch.empty_like(places).scatter_(0, places, torch.arange(len(places), device=places.device))


def masks_of(layers: Sequence[Layer], features: int) -> list[Tensor]:
    """The masks as bool on the CPU, without the columns of the context.

    Raises:
        Unknown: a mask holds something other than 0 and 1.
    """
    masks, widths = [], [features]
    for layer in layers:
        mask = layer.mask()
        if mask.dtype is not torch.bool:
            if not bool(((mask == 0) | (mask == 1)).all()):
                raise Unknown("a mask with values other than 0 and 1")
            mask = mask != 0
        masks.append(mask[:, : widths[layer.source]].cpu())
        widths.append(mask.size(0))
    return masks
