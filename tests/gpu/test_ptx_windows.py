"""The inverse by windows on the GPU path (tests/test_triton_windows.py), with the kernels' compiled PTX executed.

This is the only place where windows are solved in bfloat16 without a GPU: Triton's interpreter computes it wrongly.
"""

import pytest
import torch
from test_triton_windows import (  # noqa: F401
    draw_rows,
    flow,
    test_a_token_that_is_not_finite_touches_none_before_it_and_no_other_row,
    test_every_token_returned_satisfies_its_equation,
    test_windows_that_gain_nothing_end_in_the_sequential_answer,
)


@pytest.fixture
def where(machine, monkeypatch):
    """It fails where a test launched nothing."""
    monkeypatch.setattr("tarflow_fast.engines.triton.triton_refuses", lambda *_: None)
    monkeypatch.setattr("tarflow_fast.engines.triton.triton_missing", lambda: "")
    yield torch.device("cpu")
    assert machine.executed


def test_bfloat16(where):
    """In bfloat16 a window finds what one token after another finds, to within its tolerance and rounding."""
    model, y = flow(where), torch.tensor([0, 1, -1])
    z = draw_rows(3, 10, 3)
    right, right_log_det = model.inverse(z, y, precision="bf16")
    wide, _ = model.inverse(z, y)
    x, log_det, report = model.inverse(
        z, y, precision="bf16", solver="windows", tolerance=5e-3, window=5, return_report=True
    )
    assert all(passes < 9 for passes in report.passes.values()) and report.residual.max() <= 5e-3
    assert 1e-5 < (right - wide).abs().max() < 2e-2  # it is another precision
    assert (x - right).abs().max() < 3e-2 and (log_det - right_log_det).abs().max() < 5e-2
