"""The processes of one training run: alone, or started by torchrun (gloo on CPUs, NCCL on GPUs)."""

from __future__ import annotations

import gc
import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from tarflow_fast.validate import find_device


@dataclass(frozen=True)
class Workers:
    """This process's place among them.

    rank: 0..world-1.  world: how many processes.  device: the one this process computes on.
    """

    rank: int
    world: int
    device: torch.device

    @property
    def main(self) -> bool:
        """True on the one process that writes files and shows progress."""
        return self.rank == 0

    def mean_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Replaces tensor by its mean over all processes, in place, and returns it."""
        if self.world > 1:
            dist.all_reduce(tensor)
            tensor /= self.world
        return tensor


@contextmanager
def workers(device: str = "auto") -> Iterator[Workers]:
    """Joins the run that torchrun's environment (RANK, WORLD_SIZE, LOCAL_RANK) describes, and leaves it at the end.

    device: "auto" takes the process's GPU where there is one, else the CPU; or any torch device name.
    Raises ValueError for a device that is not there.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    chosen = find_device("train", device, int(os.environ.get("LOCAL_RANK", 0)))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if world > 1:
        # Imported later (the first optimizer step does), it keeps the process group for good (torch 2.13), and a gloo
        # thread that still owns a tensor when the interpreter ends aborts the process: 1 of 11 short runs, measured.
        importlib.import_module("torch._dynamo")

        # rank 0 draws sample grids while the others wait in the next step's all_reduce: minutes, the default, are short
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=timedelta(hours=2))
    try:
        yield Workers(rank, world, chosen)
    finally:
        if world > 1:
            gc.collect()  # DDP is full of reference cycles, and its group must go before the interpreter does
            dist.destroy_process_group()
