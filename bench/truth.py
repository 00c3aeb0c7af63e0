"""Checks a result before it is timed: its error against float64, beside plain PyTorch's in the same precision."""

from __future__ import annotations

import copy

import torch
from workloads import Workload

from tarflow_fast import ReferenceTarFlow

ROWS, TOKENS = 2, 64  # enough: rows are independent, and the first tokens of a block do not depend on later ones


class Truth:
    """The float64 inverse of the first rows; of one large block, only of its first 64 tokens."""

    def __init__(self, workload: Workload, reference: ReferenceTarFlow, noise, labels, guidance: dict) -> None:
        self.workload, self.guidance = workload, guidance
        self.short = workload.num_blocks == 1 and workload.T > TOKENS
        self.model = self._shorten(reference) if self.short else reference
        self.noise = noise[:ROWS, :TOKENS] if self.short else noise[:ROWS]
        self.labels = None if labels is None else labels[:ROWS]
        self.plain: dict[str, float] = {}
        exact = copy.deepcopy(self.model).double()
        self.tokens = exact.patchify(exact.reverse(self.noise.double(), self.labels, **guidance))

    def _shorten(self, reference: ReferenceTarFlow) -> ReferenceTarFlow:
        side = int(TOKENS**0.5) * self.workload.patch_size
        model = ReferenceTarFlow(**{**self.workload.config, "img_size": side})
        cut = {"pos_embed": TOKENS, "var": TOKENS}
        state = {}
        for key, value in reference.state_dict().items():
            name = key.rsplit(".", 1)[-1]
            state[key] = value[:TOKENS, :TOKENS] if name == "attn_mask" else value[: cut.get(name, len(value))]
        model.load_state_dict(state)
        return model.eval()

    def error(self, images: torch.Tensor, patchify) -> float:
        """The largest |x - x64| over the rows and tokens that the truth covers. images are those of the whole batch."""
        tokens = patchify(images[:ROWS])
        tokens = tokens[:, :TOKENS] if self.short else tokens
        return (tokens.double() - self.tokens).abs().max().item()

    def check(self, precision: str, images: torch.Tensor, patchify) -> float:
        """The error, after a check of the rule of `judge`."""
        error, allowed = self.judge(precision, images, patchify)
        assert error <= allowed, f"{precision}: error {error:.3g}, allowed {allowed:.3g}"
        return error

    def judge(self, precision: str, images: torch.Tensor, patchify) -> tuple[float, float]:
        """The error and the most that is allowed: twice plain PyTorch's own in that precision, plus 2 ulp.

        int8 has no plain counterpart. Its weights keep 7 bits relative to the largest of their column, where bfloat16
        keeps 8 bits of each, so its error may be 6 times that of plain bfloat16.
        """
        error, dtype = self.error(images, patchify), torch.float32 if precision == "fp32" else torch.bfloat16
        if precision not in self.plain:
            self.plain[precision] = self.plain_error(precision)
        factor = 6 if precision == "int8" else 2
        allowed = factor * self.plain[precision] + 2 * torch.finfo(dtype).eps * self.tokens.abs().max().item()
        return error if images.isfinite().all() else float("nan"), allowed

    def plain_error(self, precision: str) -> float:
        """The error of plain PyTorch, in float32 or under bfloat16 autocast."""
        with torch.autocast("cpu", torch.bfloat16, enabled=precision != "fp32"):
            images = self.model.reverse(self.noise, self.labels, **self.guidance)
        return (self.model.patchify(images).double() - self.tokens).abs().max().item()
