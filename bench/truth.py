"""A result is checked before it is timed: against the float64 reference, beside plain PyTorch in the same precision."""

from __future__ import annotations

import copy

import torch
from workloads import Workload

from tarflow_fast import ReferenceTarFlow

ROWS, TOKENS = 2, 64  # rows are independent, and the first tokens of a single block do not know how many follow


class Truth:
    """The float64 inverse of the first rows (and for one large block, of its first 64 tokens)."""

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
        """Largest |x - x64| over the rows and tokens the truth covers; images: the whole batch."""
        tokens = patchify(images[:ROWS])
        tokens = tokens[:, :TOKENS] if self.short else tokens
        return (tokens.double() - self.tokens).abs().max().item()

    def check(self, precision: str, images: torch.Tensor, patchify) -> float:
        """The error, held to the error rule: at most twice plain PyTorch's own in that precision, + 2 ulp.

        int8 has no plain counterpart: its weights keep 7 bits of a column's largest where bfloat16 keeps 8 of each, and
        it is held to 6 times the error of plain bfloat16.
        """
        error, dtype = self.error(images, patchify), torch.float32 if precision == "fp32" else torch.bfloat16
        if precision not in self.plain:
            self.plain[precision] = self.plain_error(precision)
        factor = 6 if precision == "int8" else 2
        allowed = factor * self.plain[precision] + 2 * torch.finfo(dtype).eps * self.tokens.abs().max().item()
        assert error <= allowed, f"{precision}: error {error:.3g}, allowed {allowed:.3g}"
        return error

    def plain_error(self, precision: str) -> float:
        """The same of plain PyTorch in float32, or under bfloat16 autocast."""
        with torch.autocast("cpu", torch.bfloat16, enabled=precision != "fp32"):
            images = self.model.reverse(self.noise, self.labels, **self.guidance)
        return (self.model.patchify(images).double() - self.tokens).abs().max().item()
