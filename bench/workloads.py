"""The workloads that every benchmark shares: published TarFlow sizes, and small ones that a laptop runs in seconds."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from tarflow_fast import ReferenceTarFlow, TarFlow


@dataclass(frozen=True)
class Workload:
    """A flow's shape. num_blocks = 1 stands for one block of a larger model, because blocks are inverted one by one."""

    name: str
    in_channels: int
    img_size: int
    patch_size: int
    channels: int
    num_blocks: int
    layers_per_block: int
    num_classes: int = 0
    guidance: dict = field(default_factory=lambda: {"guidance": 0.2, "attn_temp": 0.5})

    @property
    def T(self) -> int:
        return (self.img_size // self.patch_size) ** 2

    @property
    def D(self) -> int:
        return self.in_channels * self.patch_size**2

    @property
    def config(self) -> dict:
        names = ("in_channels", "img_size", "patch_size", "channels", "num_blocks", "layers_per_block", "num_classes")
        return {name: getattr(self, name) for name in names}


LABELS = {"guidance": 1.0}
WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("digits", 1, 8, 2, 128, 4, 2, 10, LABELS),
        Workload("mnist", 1, 28, 4, 128, 4, 4, 10, LABELS),
        Workload("cifar", 3, 32, 2, 256, 4, 4),
        Workload("c768_t64", 3, 16, 2, 768, 1, 8),  # the published width with few tokens, so that it runs quickly
        Workload("imagenet64", 3, 64, 2, 768, 1, 8),
        Workload("afhq256", 3, 256, 8, 768, 1, 8),
        Workload("imagenet128", 3, 128, 4, 1024, 1, 8),
    )
}


def build(workload: Workload, seed: int = 0) -> tuple[TarFlow, ReferenceTarFlow]:
    """Our model and the reference with the same random weights.

    The time of a sequential inverse does not depend on the values, but they must do something and stay finite. So
    proj_out, which is zero at the start of training, is drawn small.
    """
    torch.manual_seed(seed)
    model = TarFlow(**workload.config).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.proj_out.weight.normal_(std=0.1 / workload.channels**0.5)
    reference = ReferenceTarFlow(**workload.config).eval()
    reference.load_state_dict(model.state_dict())
    return model, reference


def inputs(workload: Workload, B: int, guided: bool, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor | None, dict]:
    """Noise (B, T, D), labels or None, and the keyword arguments of `reverse`."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(B, workload.T, workload.D, generator=generator)
    labels = torch.randint(workload.num_classes, (B,), generator=generator) if workload.num_classes else None
    return noise, labels, dict(workload.guidance) if guided else {}
