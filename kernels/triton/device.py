"""Which GPU a kernel is launched on, and what it is."""

import functools

import torch


def on(device):
    """A context: Triton launches on the current GPU, which need not be the tensors'."""
    return torch.cuda.device(device if device.type == "cuda" else -1)


@functools.cache
def architecture(device):
    """The compute capability to take from tuning.py: 90 for data-centre GPUs since Hopper and for the interpreter; 80
    for all others, newer desktop GPUs included, whose shared memory (99 KiB) is too small for the tiles of 90."""
    large = device.type != "cuda" or torch.cuda.get_device_capability(device)[0] in (9, 10)
    return 90 if large else 80
