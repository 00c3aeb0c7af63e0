"""Which GPU a kernel is launched on, and what it is."""

import functools

import torch


def on(device):
    """A context: Triton launches on the current GPU, which need not be the tensors'."""
    return torch.cuda.device(device if device.type == "cuda" else -1)


@functools.cache
def architecture(device):
    """The compute capability to take from tuning.py: 80, or 90 for all newer ones and under the interpreter."""
    newer = device.type != "cuda" or torch.cuda.get_device_capability(device)[0] >= 9
    return 90 if newer else 80
