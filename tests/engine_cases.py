"""Flow blocks drawn at random, with ragged and degenerate sizes, and helpers that invert them on each engine."""

import copy
import os
import random
import subprocess
import sys
from typing import NamedTuple

import torch

from tarflow_fast.block import MetaBlock
from tarflow_fast.engines.call import Call
from tarflow_fast.engines.cpu import Engine
from tarflow_fast.engines.cpu_native import why_not_weights
from tarflow_fast.engines.weights import inspect
from tarflow_fast.transforms import Guidance


class BlockCase(NamedTuple):
    block: MetaBlock
    z: torch.Tensor
    y: torch.Tensor | None
    guidance: Guidance


def random_block(generator, scale=0.1, **sizes):
    """A block with every parameter drawn. scale is the size of its log-scales; sizes are the arguments of MetaBlock."""
    block = MetaBlock(**sizes)
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            draw = torch.randn(parameter.shape, generator=generator)
            if "norm.weight" in name:
                parameter.copy_(1 + 0.2 * draw)
            elif "proj_out" in name:
                parameter.copy_(scale * draw / block.proj_out.in_features**0.5)
            elif parameter.ndim == 2 and "embed" not in name:
                parameter.copy_(draw / parameter.shape[-1] ** 0.5)
            else:
                parameter.copy_(0.2 * draw)
    return block.eval()


def draw_case(seed):
    """Draws a block and at least 64 rows to invert.

    Our error is compared with the largest error of PyTorch among the rows, and with fewer rows that is mere luck. Over
    2000 draws on 4 instruction sets, 6 of 16,000 log_dets exceeded the bound with 8 to 24 rows, and 5 with up to 48
    rows, because PyTorch's error happened to be small. More rows lose nothing, because a row has the same bits whatever
    the other rows are.
    """
    choose, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    head_size = choose.choice((16, 17, 24, 32, 40, 48, 64, 64, 80, 96, 128))
    heads = choose.randint(1, max(1, 256 // head_size if head_size > 64 else 4))
    num_classes = choose.choice((0, 0, 3))
    T, D, B = (
        choose.choice((1, 2, 3, 5, 9, 16, 17, 33)),
        choose.randint(1, 40),
        choose.randint(64, 96),
    )
    block = random_block(
        generator, token_size=D, channels=head_size * heads, num_tokens=T, flip=choose.random() < 0.5,
        num_layers=choose.randint(1, 3), head_size=head_size, expansion=choose.choice((1, 3, 4)),
        nvp=choose.random() < 0.8, num_classes=num_classes,
    )  # fmt: skip
    y = torch.randint(-1, num_classes, (B,), generator=generator) if num_classes and choose.random() < 0.7 else None
    weight = choose.choice((0.0, 0.0, 0.5, 2.0))
    guidance = Guidance(weight, choose.choice(("a", "b", "ab")), choose.choice((1.0, 0.7, 1.5)), choose.random() < 0.5)
    return BlockCase(block, torch.randn(B, T, D, generator=generator), y, guidance)


def given(case):
    """The case as the arguments of the engine, which takes a bijection in place of the block."""
    return case.block.bijection, *case[1:]


def run(case, precision="fp32", **options):
    return Engine(precision, **options).invert(*given(case))


def refusal(block):
    """Why the native engine does not take the block, or "" when it does."""
    found = inspect(block, "cpu")
    return found if isinstance(found, str) else why_not_weights(found)


def small_case(seed=0, B=5, **sizes):
    generator = torch.Generator().manual_seed(seed)
    sizes = dict(token_size=6, channels=128, num_tokens=21, num_layers=2, num_classes=3, flip=True) | sizes
    block = random_block(generator, **sizes)
    z = torch.randn(B, sizes["num_tokens"], sizes["token_size"], generator=generator)
    y = torch.arange(B) % 4 - 1 if sizes["num_classes"] else None
    return BlockCase(block, z, y, Guidance(1.5, "ab", 0.8, True))


@torch.no_grad()
def in_torch(case, dtype=torch.float32, autocast=False):
    """(x, log_det) as PyTorch computes them, token after token. In float64 they serve as the truth."""
    block, z, y, guidance = case
    block = block if dtype == torch.float32 else copy.deepcopy(block).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return block.invert(z.to(dtype), y, guidance, Call("torch"))


def run_python(code, timeout=120):
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-W", "ignore", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)
