"""Which GPU a kernel is launched on, and what it is."""

import functools

import torch


def on(device):
    """A context that makes `device` the current GPU, since Triton launches on that one. It does nothing for a CPU."""
    return torch.cuda.device(device if device.type == "cuda" else -1)


@functools.cache
def architecture(device):
    """The compute capability whose tiles are taken from tuning.py.

    It is 90 for data-centre GPUs since Hopper and for the interpreter, and 80 for all others. Newer desktop GPUs are
    among the others: their shared memory (99 KiB) is too small for the tiles of 90.
    """
    large = device.type != "cuda" or torch.cuda.get_device_capability(device)[0] in (9, 10)
    return 90 if large else 80
