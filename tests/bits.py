"""A stored table of the bits of `TarFlow.reverse` on the CPU engine. With it a change proves that it moved no bit.

    python tests/bits.py            prints the rows of one instruction set, the one of TARFLOW_CPU_ISA, as JSON
    python tests/bits.py --write    writes tests/bits.json anew, with every instruction set of the library

A row stands for a flow, a precision and a call. Its value is the start of the SHA-256 of the images as float32. A
frozen flow must give the same value, so each row is computed twice and stored once. Weights and noise come from an
integer hash and powers of two, because torch.randn and torch.randint may change with PyTorch's version and the machine.
So only the library's own arithmetic can move a row: it computes the means, exp and every sum itself. What PyTorch
computes on the way, one product and one square root per element, is rounded correctly on every machine.
"""

import argparse
import hashlib
import json
import math
import os
import platform
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import torch

from tarflow_fast import TarFlow, native

TABLE = Path(__file__).with_suffix(".json")
PRECISIONS = ("fp32", "bf16", "int8")
FLOWS = {  # in_channels, img_size, patch_size, channels, num_blocks, layers_per_block, nvp, num_classes
    "digits": (1, 8, 2, 128, 4, 2, True, 10),
    "mnist": (1, 28, 4, 128, 2, 2, True, 0),
    "classes": (3, 8, 2, 192, 2, 2, True, 20),  # the mean of more than 16 class embeddings is summed in two levels
    "shift": (1, 8, 2, 64, 4, 1, False, 3),
    "oblong": (3, (4, 12), 2, 64, 3, 2, True, 0),
    "odd": (1, (9, 12), 3, 192, 2, 1, True, 4),  # D = 9
    "wide": (4, 6, 2, 256, 2, 1, True, 2),
    "long": (1, (10, 13), 1, 64, 2, 1, True, 0),  # T = 130, D = 1
    "token": (3, 2, 2, 64, 2, 1, True, 0),  # T = 1: there is nothing to solve
    "pair": (1, (2, 4), 2, 64, 3, 1, True, 3),  # T = 2
    "narrow": (1, 8, 2, 128, 2, 1, True, 5),  # this model is kept in bfloat16
}
GUIDED = {"guidance": 1.5, "attn_temp": 0.8}
CALLS = {  # rows of the batch, whether labels are given, arguments of reverse
    "one": (1, True, {}),
    "three": (3, True, {}),
    "unlabelled": (3, False, {}),  # for flows with classes: every row takes the mean class embedding
    "many": (17, True, {}),
    "one guided": (1, True, GUIDED),
    "three guided": (3, True, GUIDED | {"annealed_guidance": True}),
    "guided a": (3, True, GUIDED | {"guide_what": "a"}),
    "guided b": (3, True, GUIDED | {"guide_what": "b", "annealed_guidance": True}),
    "guided by labels": (3, True, {"guidance": 1.5}),  # without a temperature
    "many guided": (17, True, GUIDED),
    "groups": (260, True, {}),  # these are more rows than the engine inverts together
}
FROZEN = ", frozen"
ONLY_WITH_CLASSES = ("unlabelled", "guided by labels")


def uniform(name, *shape):
    """Numbers in [-1, 1) that are multiples of 2^-22. Their bits come from a hash (splitmix64) of name and index."""
    start = np.uint64(zlib.crc32(name.encode()) << 32)
    x = np.arange(math.prod(shape), dtype=np.uint64) + start
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x = (x ^ (x >> np.uint64(31))) >> np.uint64(41)
    return torch.from_numpy((x.astype(np.int64) - 2**22).astype(np.float32)).reshape(shape) * 2.0**-22


def make_flow(name):
    """The flow with every weight drawn, such that a product is about as large as its input."""
    model = TarFlow(*FLOWS[name], backend="cpu")
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            draw = uniform(f"{name} {key}", *parameter.shape)
            if "norm.weight" in key:
                draw = 1 + draw / 4
            elif parameter.ndim == 2 and "embed" not in key:
                draw = draw * 2.0 ** (1 - parameter.shape[-1].bit_length() // 2)
                draw = draw / 8 if "proj_out" in key else draw
            else:
                draw = draw / 4
            parameter.copy_(draw)
        model.var.copy_(1 + uniform(f"{name} var", *model.var.shape) / 2)
    return model.eval().bfloat16() if name == "narrow" else model.eval()


def make_noise(model, name, B):
    """Noise (B, T, D) of variance 1. It is exact in float32, because the sum of three such numbers has 24 bits."""
    parts = [uniform(f"{name} noise {i} of {B}", B, *model.var.shape) for i in range(3)]
    return (parts[0] + parts[1] + parts[2]).to(model.var.dtype)


def make_labels(model, B):
    """Labels that run through -1 ("no label") and every class. None for a flow without classes."""
    return torch.arange(B) % (model.num_classes + 1) - 1 if model.num_classes else None


def digest(*tensors):
    """16 hex digits that stand for the bits of the tensors, taken as float32."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(np.ascontiguousarray(tensor.detach().float().numpy(), dtype="<f4").tobytes())
    return sha.hexdigest()[:16]


def calls_of(name):
    """The calls made with one flow. Two of them need a flow with classes, and only "pair" takes the large batch."""
    for call, (B, *_) in CALLS.items():
        if call in ONLY_WITH_CLASSES and not FLOWS[name][-1]:
            continue
        if B <= 17 or name == "pair":
            yield call


def row_of(model, name, call, precision, noise=None):
    """The value of one row. `noise` replaces the noise of the table."""
    B, labelled, arguments = CALLS[call]
    noise = make_noise(model, name, B) if noise is None else noise
    y = make_labels(model, B) if labelled else None
    return digest(model.reverse(noise, y, **arguments, precision=precision, nonfinite="raise"))


def inputs():
    """The digest of each flow's weights and noise. Where a digest differs, the rows say nothing about the engine."""
    made = {}
    for name in FLOWS:
        model = make_flow(name)
        weights = [parameter for _, parameter in sorted(model.named_parameters())]
        made[name] = digest(*weights, model.var, *(make_noise(model, name, B) for B in (1, 3, 17, 260)))
    return made


def rows():
    """The rows of the instruction set in use, {"flow, precision, call": value}. Keys of frozen flows end in FROZEN."""
    made = {}
    for name in FLOWS:
        model = make_flow(name)
        for frozen in (False, True):
            model = model.freeze() if frozen else model
            for precision in PRECISIONS:
                for call in calls_of(name):
                    key = f"{name}, {precision}, {call}" + (FROZEN if frozen else "")
                    made[key] = row_of(model, name, call, precision)
    return made


def rows_of(isa):
    """The rows of instruction set `isa`, from a new process, because a process chooses its set only once."""
    environment = os.environ | {"TARFLOW_CPU_ISA": isa, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise RuntimeError(f"the rows of {isa} could not be computed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout)


def differences(stored, made):
    """One line for each difference between the computed and the stored rows of one instruction set.

    An empty list means that no bit moved.
    """
    lines = [
        f"{key}: stored, but no longer computed" for key in stored.keys() - {key.removesuffix(FROZEN) for key in made}
    ]
    for key, value in made.items():
        expected = stored.get(key.removesuffix(FROZEN), "no such row")
        if value != expected:
            lines.append(f"{key}: {value}, stored {expected}")
    return lines


def build():
    """What decides about bits in the build of the library: compiler, flags other than warnings, and machine."""
    report = native.build_report()
    return {
        "compiler": report.get("compiler_version"),
        "flags": " ".join(flag for flag in report.get("flags", "").split() if not flag.startswith("-W")),
        "isas": report.get("isas"),
        "machine": platform.machine(),
    }


def write():
    git = ["git", "-C", str(TABLE.parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    stored = {}
    for isa in native.isas():
        made = rows_of(isa)
        stored[isa] = {key: value for key, value in made.items() if not key.endswith(FROZEN)}
        if lines := differences(stored[isa], made):
            raise RuntimeError(f"{isa}: freezing a flow changes its bits:\n" + "\n".join(lines))
    table = {"commit": commit, "build": build(), "inputs": inputs(), "rows": stored}
    TABLE.write_text(json.dumps(table, indent=1) + "\n")
    print(f"{TABLE}: {sum(map(len, stored.values()))} rows of {', '.join(stored)} at {commit}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write tests/bits.json anew")
    if parser.parse_args().write:
        write()
    else:
        print(json.dumps(rows(), indent=1))
