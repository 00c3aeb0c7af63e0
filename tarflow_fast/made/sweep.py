"""The sweep in plain PyTorch: the definition of the one in C++, and the path where that one is not at hand."""

from __future__ import annotations

import torch
from torch import Tensor

from tarflow_fast.made.net import Made
from tarflow_fast.made.schedule import Schedule, standing

__all__ = ["sweep"]


def sweep(made: Made, schedule: Schedule, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    """The inverse x of y (B, D), and log |det dx/dy| (B,), each unit computed once.

    context: (B, E), or (1, E) for all rows. Units lie in the order of their steps, (units, B), so that what a step
    reads is one contiguous part from the start.
    """
    terms = [None if layer.term is None else layer.term(context) for layer in made.layers]
    gates = [None if layer.gate is None else layer.gate(context) for layer in made.layers]
    (D,), B = schedule.places[0].shape, y.size(0)
    places = [each.to(y.device) for each in schedule.places]
    weights, biases, values = [], [], [y.new_empty(D, B)]
    for number, layer in enumerate(made.layers):
        rows, columns = places[number + 1], places[layer.source]
        weight = (layer.mask() * layer.weight())[rows][:, columns].to(y.dtype)
        bias = layer.bias()
        bias = y.new_zeros(len(rows), 1) if bias is None else bias[rows, None]
        biases.append(bias if terms[number] is None else bias + terms[number].T[rows])
        weights.append(weight)
        values.append(y.new_empty(len(rows), B))
    gates = [None if gate is None else gate.T[places[number + 1]] for number, gate in enumerate(gates)]
    # A vector after each activation that is read of it, so that the activation is computed once, too.
    seen = {(layer.source, layer.activation): torch.empty_like(values[layer.source]) for layer in made.layers}
    residuals = [None if layer.residual is None else standing(places[layer.residual]) for layer in made.layers]
    x, log_det, noise = values[0], y.new_zeros(B), y.T[places[0]]
    for s in range(schedule.steps):
        for number, layer in enumerate(made.layers):
            first, last = schedule.starts[number + 1][s : s + 2]
            if first == last:
                continue
            starts = schedule.starts[layer.source]
            inputs = starts[s] if layer.source == 0 else starts[s + 1]
            v = weights[number][first:last, :inputs] @ seen[layer.source, layer.activation][:inputs]
            v = v + biases[number][first:last]
            if gates[number] is not None:
                v = v * gates[number][first:last]
            if layer.residual is not None:
                v = v + values[layer.residual][residuals[number][places[number + 1][first:last]]]
            values[number + 1][first:last] = v
            for (vector, activation), activated in seen.items():
                if vector == number + 1:
                    activated[first:last] = activation(v)
        first, last = schedule.starts[0][s : s + 2]
        P = made.univariate.parameters
        parameters = values[-1][first * P : last * P].T.reshape(B, last - first, P)
        got, ladj = made.univariate.inverse(noise[first:last].T, parameters)
        x[first:last] = got.T
        for (vector, activation), activated in seen.items():
            if vector == 0:
                activated[first:last] = activation(got.T)
        log_det = log_det + ladj.sum(-1)
    return torch.empty_like(y).index_copy_(1, places[0], x.T), log_det
