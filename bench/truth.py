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

    def plain_error(self, precision: str) -> float:
        """The same of plain PyTorch in float32, or under bfloat16 autocast."""
        with torch.autocast("cpu", torch.bfloat16, enabled=precision != "fp32"):
            images = self.model.reverse(self.noise, self.labels, **self.guidance)
        return (self.model.patchify(images).double() - self.tokens).abs().max().item()
