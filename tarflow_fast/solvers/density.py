"""Density without gradients: the net over all tokens, some rows and tokens at a time, on an engine's passes.

    parameters_i = net(x_{p(0)} .. x_{p(i)});  z_{p(i+1)} = transform(x_{p(i+1)}; parameters_i)  (arXiv 2412.06329, 2.1)

All tokens are known, so a pass takes as many of them as it likes. How they are cut into passes changes no bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tarflow_fast import native
from tarflow_fast.dtypes import wide_dtype
from tarflow_fast.engines.call import Call
from tarflow_fast.engines.table import Path, check_precision, find_path, open_passes
from tarflow_fast.transforms import Bijection, Guidance

__all__ = ["density_paths", "encode_all"]


def density_paths(bijections: Sequence[Bijection], x: Tensor, call: Call) -> list[Path]:
    """The paths of an engine that computes the density at x (B, T, D) faster than the modules do; [] where none does.

    Raises:
        RuntimeError: a precision was asked for that no engine takes these blocks in; the reason is named.
    """
    # Measured on a Zen 5 with AVX-512, and with AVX2 on both sides (bench/test_density.py): the engine took 0.4 to 0.9
    # of PyTorch's time. Its baseline set is for processors that have neither. It runs if a precision is asked for.
    if call.precision is None and native.isa() in native.isas()[:1]:
        return []
    paths = []
    for bijection in bijections:
        path = find_path(bijection, x, call, insist=False)
        if path.engine != "cpu":
            check_precision(bijection, x, call, path.reason or f"{path.engine!r} has no passes over known tokens")
            return []
        paths.append(path)
    return paths


@torch.no_grad()
def encode_all(
    bijections: Sequence[Bijection], x: Tensor, y: Tensor | None, call: Call, paths: Sequence[Path]
) -> tuple[list[Tensor], Tensor]:
    """x (B, T, D) through all blocks.

    Args:
        y: (B,) int64 labels, negative for none; or None.
        paths: what `density_paths` gave.

    Returns:
        The tokens (B, T, D) after each block, in x's dtype, z the last; log |det dz/dx| (B,), nats, float32 or wider.
    """
    stages, log_det = [x], torch.zeros(x.size(0), dtype=wide_dtype(x), device=x.device)
    for bijection, path in zip(bijections, paths, strict=True):
        z, stretched = _encode(bijection, stages[-1], y, call, path)
        stages.append(z)
        log_det += stretched
    return stages[1:], log_det


def _encode(bijection: Bijection, x: Tensor, y: Tensor | None, call: Call, path: Path) -> tuple[Tensor, Tensor]:
    _, transform, order = bijection
    passes = open_passes(bijection, x, y, Guidance(), call, path)
    tokens = order.take(x).float()
    B, T, D = tokens.shape
    rows_together, window = passes.tile(B)
    z, log_det = torch.empty_like(tokens), tokens.new_empty(B, dtype=wide_dtype(x))
    parameters = tokens.new_empty(min(rows_together, B), T, len(transform.parts) * D)
    for begin in range(0, B, rows_together):
        rows = slice(begin, min(begin + rows_together, B))
        part = parameters[: rows.stop - begin]
        for position in range(0, T - 1, window):  # the output at the last token conditions none
            end = min(position + window, T - 1)
            part[:, position:end] = passes.run(tokens[rows, position:end], position, rows)
        part[:, T - 1] = 0
        z[rows], log_det[rows] = transform.forward(tokens[rows], part, False, "auto")
    return order.put(z).to(x.dtype), log_det
