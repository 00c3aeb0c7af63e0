"""The native loop of the solver by windows gives the bits and the report of the loop in Python.

The loop in Python (solvers/windows.py) takes the same native passes. Only its guesses need the library's own exp, which
`tf_test_exp` computes.
"""

import itertools

import pytest
import torch
from compare import same_bits
from flows import random_flow
from tokens import random_tokens_flow

from tarflow_fast import native
from tarflow_fast.engines.call import Call
from tarflow_fast.engines.cpu_steps import CpuSteps
from tarflow_fast.engines.table import open_passes
from tarflow_fast.flows import open_flow
from tarflow_fast.solvers.windows import solve_by_windows
from tarflow_fast.transforms import Guidance

pytestmark = pytest.mark.skipif(not native.available(), reason=native.reason() or "native")

SHUFFLED = torch.randperm(24, generator=torch.Generator().manual_seed(5)).tolist()
GUIDANCES = [
    Guidance(),
    Guidance(1.5, "ab", 0.8, True),
    Guidance(2.0, "a"),
    Guidance(1.0, "b", 1.3),
]


def guess_natively(transform, z, parameters):
    """`guess_from_last` with the exp of the library."""
    parameters = parameters.expand(-1, z.size(1), -1)
    if transform.name == "shift":
        return z + parameters
    a, b = (part.contiguous() for part in parameters.chunk(2, dim=-1))
    factor = torch.empty_like(a)
    native.library().tf_test_exp(native.pointer(a), native.pointer(factor), a.numel())
    return z * factor + b


def flow(name):
    if name in ("digits", "fashion"):
        return open_flow(name)[0]
    if name == "permuted":
        return random_tokens_flow(num_tokens=24, scale=0.1, num_classes=3, orders=[SHUFFLED, SHUFFLED[::-1]])
    # the last two make iterates, and rows in truth, run away
    scale = {"affine": 0.3, "shift": 0.3, "stiff": 0.35, "hopeless": 0.7}[name]
    size = {"img_size": (8, 16)} if name in ("stiff", "hopeless") else {}
    return random_flow(scale=scale, num_classes=3, nvp=name not in ("shift", "hopeless"), **size)


def both(model, z, y, guidance, precision, window, tolerance, blocks=slice(None), call_tokens=None, error=None):
    """What both loops give, for each block."""
    with Call("cpu", precision) as call:
        for block in model.blocks[blocks]:
            passes = open_passes(block.bijection, z, y, guidance, call)
            W = min(window, z.size(1) - 1)
            steps = passes.steps(slice(0, len(z)), len(z), W)
            if call_tokens is not None:
                steps._call_tokens = call_tokens
            draft, told, found = None, [], []
            if error is not None:  # a draft that is off by so much, and overflows here and there
                draft = passes.solve(z)[0] + error * torch.randn(z.shape, generator=torch.Generator().manual_seed(2))
                draft[::2, 5:9] = torch.inf
            for guess in (guess_natively, None):
                counts = []
                found.append(solve_by_windows(steps, block.bijection, z, W, tolerance, counts.append, guess, draft))
                told.append(sum(counts))
            assert told == [len(z) * (z.size(1) - 1)] * 2
            yield found


def assert_same(found):
    (x, log_det, report), (own_x, own_log_det, own) = found
    assert same_bits(own_x, x) and same_bits(own_log_det, log_det)
    assert (own.passes, own.single, own.work) == (report.passes, report.single, report.work)
    assert own.accepted.tolist() == report.accepted.tolist()
    assert own.fallbacks.tolist() == report.fallbacks.tolist()
    assert same_bits(own.residual, report.residual)


@pytest.mark.every_isa
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("guidance", GUIDANCES, ids=["plain", "annealed", "a", "b"])
@pytest.mark.parametrize("name", ["digits", "permuted", "affine", "shift", "stiff", "hopeless"])
def test_both_loops_give_the_same_bits_and_report(name, guidance, precision, threads):
    model, y = flow(name), torch.tensor([0, 1, -1, 2, 1])
    z = torch.randn(5, *model.var.shape, generator=torch.Generator().manual_seed(6))
    z[1, 5] *= 3
    settings = itertools.product((1, 5, 100), (0.0, 1e-2))
    for number, (window, tolerance) in enumerate(settings):
        threads(1 + number % 2)
        for found in both(model, z, y, guidance, precision, window, tolerance, slice(-2, None)):
            assert_same(found)


def test_rows_that_overflow_or_diverge_are_among_them():
    """The flows above do reach what they are for: rows that are lost, and windows solved one token after another."""
    z = torch.randn(5, 32, 4, generator=torch.Generator().manual_seed(6))
    lost = [found[1][2].residual.isnan().sum() for found in both(flow("stiff"), z, None, Guidance(), "fp32", 5, 1e-2)]
    assert all(0 < number < 5 for number in lost)
    for _, (_, _, report) in both(flow("hopeless"), z, None, Guidance(), "fp32", 5, 1e-2):
        assert (report.fallbacks > 0).all() and report.single > 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_trained_flow_of_long_sequences(precision):
    model = flow("fashion")
    z = torch.randn(2, *model.var.shape, generator=torch.Generator().manual_seed(6))
    for found in both(model, z, None, Guidance(), precision, 16, 1e-3, slice(0, 1)):
        assert_same(found)
        assert found[1][2].passes < 120 and found[1][2].residual.max() > 1e-4


def test_passes_cut_into_several_calls_change_nothing(threads):
    """No more tokens in a native call than it may take, whatever that is; and calls that stop after each."""
    model, y = flow("stiff"), torch.arange(7) % 3
    z = torch.randn(7, *model.var.shape, generator=torch.Generator().manual_seed(7))
    for guidance in (GUIDANCES[0], GUIDANCES[1]):
        for call_tokens in (1, 16, 40, 1000):
            threads(1 + call_tokens % 2)
            for found in both(model, z, y, guidance, "fp32", 8, 1e-2, call_tokens=call_tokens):
                assert_same(found)


def test_calls_that_stop_early_go_on_where_they_stopped(monkeypatch):
    model, y = flow("permuted"), torch.tensor([0, 1, 2])
    z = torch.randn(3, *model.var.shape, generator=torch.Generator().manual_seed(7))
    monkeypatch.setattr("tarflow_fast.engines.cpu_steps.SECONDS", 0.0)
    counts = []
    with Call("cpu", "fp32") as call:
        bijection = model.blocks[0].bijection
        steps = open_passes(bijection, z, y, Guidance(), call).steps(slice(0, 3), 3, 6)
        steps._call_tokens = 6  # a row in a call
        _, _, report = solve_by_windows(steps, bijection, z, 6, 1e-3, counts.append)
    assert report.passes < len(counts) <= 3 * report.passes
    assert sum(counts) == 3 * 23 and max(counts) <= 6
    for found in both(model, z, y, Guidance(), "fp32", 6, 1e-3, call_tokens=6):
        assert_same(found)


def test_what_does_not_fit_is_refused():
    model = flow("affine")
    z = torch.randn(3, *model.var.shape)
    with Call("cpu", "fp32") as call:
        bijection = model.blocks[0].bijection
        passes = open_passes(bijection, z, None, Guidance(), call)
        steps = passes.steps(slice(0, 3), 3, 4)
        with pytest.raises(ValueError, match=r"^solve_by_windows: 3 rows by windows of 5 do not fit a workspace of 3 "):
            steps.solve(z, 5, 1e-3)
        with pytest.raises(ValueError, match=r"^solve_by_windows: z must be \(B, 16, 4\), got \(3, 15, 4\)$"):
            steps.solve(z[:, :15], 4, 1e-3)
        plan, space = steps._plan, steps._workspace
        labelled = CpuSteps(plan, space, bijection, torch.tensor([0, 3, 1]), 3, Guidance())
        with pytest.raises(ValueError, match=r"^solve_by_windows: y must be below num_classes = 3$"):
            labelled.solve(z, 4, 1e-3)


def test_sixteen_rows_of_wide_windows_are_one_part():
    """Rows that are done leave the passes, so that a batch in one part takes fewer than in two."""
    model = flow("fashion")
    with Call("cpu", "fp32") as call:
        z = torch.randn(16, *model.var.shape)
        passes = open_passes(model.blocks[0].bijection, z, None, Guidance(), call)
        assert passes.rows_for(16, 64) == 16
        assert passes.rows_for(1000, 64) == 64


@pytest.mark.every_isa
@pytest.mark.parametrize("name", ["digits", "permuted", "stiff"])
def test_drafts_are_taken_alike(name):
    model = flow(name)
    z = torch.randn(5, *model.var.shape, generator=torch.Generator().manual_seed(4))
    for guidance, error, tolerance in itertools.product(GUIDANCES[:2], (1e-4, 0.1), (0.0, 1e-3)):
        for found in both(model, z, torch.arange(5) % 3, guidance, "fp32", 8, tolerance, error=error):
            assert_same(found)
