"""Whole blocks, solved by the compiled PTX of a step's kernels, against reference.py (tests/test_graph_inverse.py).

This is the only place where blocks are solved in bfloat16 without a GPU: Triton's interpreter computes it wrongly.
"""

import pytest
import test_graph_inverse
import torch
from test_graph_inverse import no_grad, test_a_block_is_that_of_the_reference  # noqa: F401


@pytest.fixture
def triton_device(machine, monkeypatch, request):
    monkeypatch.setattr(test_graph_inverse, "triton_refuses", lambda *_: None)
    yield torch.device("cpu")
    assert machine.executed or request.node.callspec.params["storage"] == "fp16"  # of which most cases are skipped
