"""Planted errors are found: a missing barrier, a wait too early, a missing mask, and what else goes wrong in kernels.

Every barrier of the step's kernels is taken out once, and every one is missed but those of IDLE. So the tests would
find a kernel that lacks one.
"""

import re

import planted
import pytest
import test_step_kernels as steps
import torch
from ptx.faults import OutOfBounds, Race, Undefined

CPU, BF16, FP32 = torch.device("cpu"), torch.bfloat16, torch.float32
CALLS = {  # one call of each kernel; linear and attention with sums that several programs share, and without
    "embed": lambda: steps.test_embed(3, 4, 16, 12, "any", BF16, CPU),
    "residual": lambda: steps.test_residual(5, 256, 16, BF16, CPU),
    "residual, split": lambda: steps.test_residual(33, 256, 64, BF16, CPU),
    "gelu": lambda: steps.test_gelu(5, 256, 16, BF16, CPU),
    "normalize": lambda: steps.test_gelu(18, 64, 96, BF16, CPU),
    # Programs walk over four tiles, so that each buffer of the pipeline is filled again while others are read.
    "attention": lambda: steps.test_cached_attention(2, 1, 1, 16, 3200, [130, 3190], BF16, CPU),
    "attention, window": lambda: steps.test_cached_attention(2, 3, 2, 32, 200, [0, 130], BF16, CPU),
    "tail": lambda: steps.test_affine_inverse(2, 4, 32, 20, True, True, "any", BF16, CPU),
}
# In the pipeline of decode attention each thread reads only what it copied itself, so it waits for its own copies only.
# The compiler puts barriers there all the same.
IDLE = {"attention": [2, 3, 4]}
LARGE = {  # more inputs than a tile, so that copies are under way while others are used
    "linear": lambda: steps.test_residual(16, 3072, 32, BF16, CPU),
    "attention": CALLS["attention"],
    "attention, window": CALLS["attention, window"],
    "embed": lambda: steps.test_embed(2, 1, 64, 200, "any", BF16, CPU),
}


def places(machine, call, pattern):
    """How often a pattern occurs at most in the PTX of the kernels of a call."""
    counts = []
    machine.edit = lambda text: (counts.append(len(re.findall(pattern, text))), text)[1]
    call()
    return max(counts)


def plant(machine, edit):
    machine.edit = edit
    machine.programs.clear()


@pytest.mark.parametrize("name", CALLS)
def test_every_barrier_is_missed(name, machine):
    count = places(machine, CALLS[name], planted.BARRIER)
    assert count >= (1 if name == "embed" else 2)
    idle = []
    for number in range(count):
        plant(machine, planted.replaced(planted.BARRIER, number, ""))
        try:
            CALLS[name]()
            idle.append(number)
        except Race as fault:
            assert "PTX line" in str(fault)
    assert idle == IDLE.get(name, [])


@pytest.mark.parametrize(
    "pattern, by", [(planted.WAIT, planted.one_more), (planted.COMMIT, "")], ids=["wait", "commit"]
)
@pytest.mark.parametrize("name", LARGE)
def test_a_copy_that_nothing_waits_for(name, pattern, by, machine):
    """At least one copy of each pipeline is then used before it has arrived, and none of these edits passes unseen."""
    count, found = places(machine, LARGE[name], pattern), []
    assert count >= 2 or name == "embed"
    for number in range(count):
        plant(machine, planted.replaced(pattern, number, by))
        try:
            LARGE[name]()
        except Race as fault:
            assert "cp.async" in str(fault)
            found.append(number)
    assert len(found) >= count - 1, "the last wait of a kernel may have nothing left to wait for"


@pytest.mark.parametrize("name", ["residual, split", "attention"])
def test_programs_that_nothing_puts_in_order(name, machine):
    plant(machine, lambda text: text.replace(".acq_rel.", ".relaxed."))
    with pytest.raises(Race, match="another warp or program"):
        CALLS[name]()


@pytest.mark.parametrize("name", ["residual", "embed", "tail"])
def test_a_store_without_its_mask(name, machine):
    plant(machine, planted.without_masks("st"))
    with pytest.raises(OutOfBounds, match=r"which has \d+ bytes"):
        CALLS[name]()


@pytest.mark.parametrize("name", ["residual", "gelu", "attention"])
def test_a_load_without_its_mask(name, machine):
    plant(machine, planted.without_masks("ld"))
    with pytest.raises((OutOfBounds, AssertionError)):
        CALLS[name]()


@pytest.mark.parametrize("name", ["residual, split", "attention"])
def test_a_counter_that_is_not_reset(name, machine):
    plant(machine, planted.without_reset)
    with pytest.raises(AssertionError, match=r"counters|torch.int32"):
        CALLS[name]()


def test_a_buffer_that_is_too_short(machine, monkeypatch):
    def short(*args):
        weight, bias, scratch = layer(*args)
        return weight, bias, scratch | {"partials": scratch["partials"][: 33 * 64]}  # room for one part

    layer = steps.layer
    monkeypatch.setattr(steps, "layer", short)
    with pytest.raises(
        OutOfBounds, match=r"16 bytes of partial_ptr, which has 8448 bytes, at 8448; PTX line \d+ \(step_lin"
    ):
        CALLS["residual, split"]()


def test_sums_that_no_program_wrote(machine, monkeypatch):
    def unset(*args):
        made = layer(*args)
        machine.undefine(made[2]["partials"])
        return made

    layer = steps.layer
    monkeypatch.setattr(steps, "layer", unset)
    CALLS["residual, split"]()  # reads no more than it wrote
    plant(machine, planted.without_partial_sums)
    with pytest.raises(Undefined, match="stores an undefined value"):
        CALLS["residual, split"]()
