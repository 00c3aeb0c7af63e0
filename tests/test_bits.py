"""`TarFlow.reverse` gives the bits that tests/bits.json stores, with each instruction set that this machine can run."""

import json

import bits
import pytest
import torch

from tarflow_fast import native

BEST = native.isa()
TABLE = json.loads(bits.TABLE.read_text())
AGAIN = "a change that means to move bits says so and runs `python tests/bits.py --write`"


@pytest.fixture
def same_build():
    """Skips if the library was built otherwise than for the table, because a compiler may order sums differently."""
    if BEST is None:
        pytest.skip(native.reason())
    for what, built in bits.build().items():
        if built != TABLE["build"][what]:
            pytest.skip(f"the table has another {what}: built with {built}, stored {TABLE['build'][what]}")


def test_inputs():
    """Weights and noise are those of the table, bit for bit, with every PyTorch, and also without the library."""
    assert bits.inputs() == TABLE["inputs"]


@pytest.mark.parametrize("isa", TABLE["rows"])
def test_rows(isa, same_build):
    if isa not in native.isas():
        pytest.skip(f"this library has no {isa}")
    if native.isas().index(isa) > native.isas().index(BEST):
        pytest.skip(f"{isa} is beyond {BEST}, which this machine or TARFLOW_CPU_ISA allows")
    made = bits.rows_of(isa)
    lines = bits.differences(TABLE["rows"][isa], made)
    shown = "\n".join(lines[:40])
    assert not lines, (
        f"{isa}: {len(lines)} of {len(made)} rows differ from those of {TABLE['commit']}; {AGAIN}\n{shown}"
    )


def test_rows_see_one_bit(same_build):
    """If the last bit of one number of the noise changes, the row's value changes, and the report names that row."""
    stored, name, key = TABLE["rows"][BEST], "digits", "digits, fp32, three"
    model = bits.make_flow(name)
    noise = bits.make_noise(model, name, 3)
    right = bits.row_of(model, name, "three", "fp32", noise)
    assert right == stored[key]
    noise[1, 5, 2] = noise[1, 5, 2].nextafter(torch.tensor(9.0))
    moved = bits.row_of(model, name, "three", "fp32", noise)
    assert bits.differences({key: right}, {key: moved}) == [f"{key}: {moved}, stored {right}"]
    assert bits.differences({key: right}, {}) == [f"{key}: stored, but no longer computed"]
    assert bits.differences({key: right}, {key: right, key + bits.FROZEN: moved}) != []
