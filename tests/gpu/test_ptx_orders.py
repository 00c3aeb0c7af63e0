"""Programs may run in any order and turn by turn: the bits of a result do not show it."""

import numpy as np
import pytest
import test_step_kernels as steps
import torch
from compare import same_bits
from ptx.memory import Memory
from test_ptx_planted import CALLS


def results(machine, monkeypatch, call):
    """What a call gives assert_accurate or Judged to look at: all its outputs."""
    found = []
    monkeypatch.setattr(steps, "assert_accurate", lambda name, got, *_: found.append(got.clone()))
    monkeypatch.setattr(steps.Judged, "add", lambda _, name, got, *__: found.append(got.clone()))
    monkeypatch.setattr(steps.Judged, "check", lambda _: None)
    torch.manual_seed(7)
    call()
    return found


@pytest.mark.parametrize("name", CALLS)
def test_twenty_orders(name, machine, monkeypatch):
    expected = results(machine, monkeypatch, CALLS[name])
    assert expected
    for seed in range(20):
        machine.order = np.random.default_rng(seed)
        got = results(machine, monkeypatch, CALLS[name])
        assert all(same_bits(ours, theirs) for ours, theirs in zip(got, expected, strict=True))


def test_orders_change_who_adds_up(machine, monkeypatch):
    """The test above has a meaning only if it is not always the same program that arrives last and adds up."""
    arrived = []
    atomic = Memory.atomic

    def noted(memory, group, lane, *rest):
        arrived.append(int(group.programs[lane // memory.threads]))
        return atomic(memory, group, lane, *rest)

    monkeypatch.setattr(Memory, "atomic", noted)
    for seed in range(20):
        machine.order = np.random.default_rng(seed)
        CALLS["residual, split"]()
    programs = max(arrived) + 1
    assert programs > 2 and {arrived[i] for i in range(programs - 1, len(arrived), programs)} == set(range(programs))
