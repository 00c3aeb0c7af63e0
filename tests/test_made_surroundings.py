"""What else is going on where a transform is inverted: another default device, transforms of torch.func, tracing."""

import time

import pytest
import torch
from made_cases import PATHS, zuko_case

from tarflow_fast import made
from tarflow_fast.made.schedule import _generations

every = pytest.mark.parametrize("path", PATHS)


@every
def test_another_default_device(path):
    """New tensors would then not be on the CPU, where the engine reads its memory."""
    case = zuko_case(4, 2)
    y, context = case.noise(), case.contexts()
    expected = case.run(y, context)
    with torch.device("meta"):
        case.accelerate(path)
        got = case.run(y, context)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_the_steps_of_many_features_are_found_in_time():
    """The work grows with the square of their number. By its third power this takes a minute or so."""
    D = 3072
    began = time.perf_counter()
    steps = _generations(torch.ones(D, D, dtype=torch.bool).tril(-1))
    assert torch.equal(steps, torch.arange(D)) and time.perf_counter() - began < 10
