"""The published Jacobi methods: where they may iterate to the end, they give the sequential answer, and no sooner."""

import sys
from pathlib import Path

import pytest
import torch

from tarflow_fast.flows import open_flow

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
from peers import jacobi as peers_jacobi


@pytest.fixture(scope="module")
def drawn():
    model, _ = open_flow("digits")
    generator = torch.Generator().manual_seed(0)
    noise, y = torch.randn(6, 16, 4, generator=generator), torch.arange(6)
    return model, noise, y, model.patchify(model.reverse(noise, y, guidance=1.0))


def test_whole_iterations_end_at_the_sequential_answer(drawn):
    """T - 1 iterations are enough whatever the weights: after i of them, i tokens are exact."""
    model, noise, y, sequential = drawn

    def patient(passes, bijection, z, first):
        x = z.clone()
        return x, peers_jacobi.iterate(passes, bijection, z, x, 0, 15, 15, lambda moved: False)

    found, counts = peers_jacobi.invert(model, noise, y, patient, guidance=1.0)
    assert counts == dict.fromkeys(range(4), 15)
    torch.testing.assert_close(found, sequential, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", peers_jacobi.METHODS)
def test_methods_take_fewer_passes_and_are_not_exact(drawn, name):
    model, noise, y, sequential = drawn
    found, counts = peers_jacobi.invert(model, noise, y, peers_jacobi.METHODS[name], guidance=1.0)
    difference = (found - sequential).abs().max().item()
    assert sum(counts.values()) < 60 or name == "GS-Jacobi"  # the segments of 16 tokens are too short to gain there
    assert 1e-6 < difference or name == "GS-Jacobi"
    assert difference < 3


def test_selective_jacobi_decodes_the_first_block_sequentially(drawn):
    model, noise, y, _ = drawn
    _, counts = peers_jacobi.invert(model, noise, y, peers_jacobi.selective_jacobi)
    assert counts[3] == 15 and all(counts[k] < 15 for k in range(3))


def test_gs_jacobi_clamps(drawn):
    """Its fixed point is another one where a token of any block lies outside +-3."""
    model, noise, y, _ = drawn
    found, _ = peers_jacobi.invert(model, noise * 3, y, peers_jacobi.gs_jacobi)
    stages = [model.patchify(stage) for stage in model.reverse(noise * 3, y, return_sequence=True)]
    assert stages[1].abs().max() > 3.5 and (found - stages[-1]).abs().max() > 0.1
