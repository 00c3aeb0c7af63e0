"""The tests of acceptance on the device (tests/test_accept.py), with the kernel's compiled PTX executed."""

import pytest
import test_accept
from test_accept import (  # noqa: F401
    test_the_kernel_does_what_the_rule_says,
    test_windows_that_gain_nothing_are_taken_one_by_one,
    where,
)


@pytest.fixture(autouse=True)
def executed(machine, monkeypatch):
    """It fails where a test launched nothing."""
    for name in ("triton_refuses", "triton_missing"):  # what runs here is no Triton
        monkeypatch.setattr(test_accept, name, lambda *_: None)
    yield
    assert machine.executed
