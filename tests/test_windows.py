"""The inverse by windows keeps its promise: every token returned satisfies its own equation to within the tolerance.

The judge is the reference in float64. It evaluates each block's equations in one parallel pass over what is returned.
"""

import pytest
import torch
from compare import same_bits
from flows import random_flow
from tokens import random_tokens_flow

from tarflow_fast import TarFlow, native
from tarflow_fast.engines.call import Call
from tarflow_fast.engines.table import open_passes
from tarflow_fast.flows import open_flow
from tarflow_fast.solvers import Solving, invert
from tarflow_fast.solvers.nonfinite import NonFiniteError, bad_rows
from tarflow_fast.solvers.windows import CommonSteps, guess_from_last, guess_noise, solve_by_windows
from tarflow_fast.transforms import Guidance
from tarflow_fast.verify.equations import residuals

NATIVE = pytest.mark.skipif(not native.available(), reason=native.reason() or "native")
BACKENDS = ["torch", pytest.param("cpu", marks=NATIVE)]
GUIDED = {"guidance": 1.5, "guide_what": "ab", "attn_temp": 0.8, "annealed_guidance": True}
SHUFFLED = torch.randperm(24, generator=torch.Generator().manual_seed(5)).tolist()


def draw(model, n, y, **arguments):
    """The stages (n, T, D) of samples, the scaled noise first, and the report where one was asked for."""
    result = model.sample(n, y, seed=3, return_sequence=True, **arguments)
    stages, report = result if isinstance(result, tuple) else (result, None)
    stages = [model.patchify(stage) if isinstance(model, TarFlow) else stage for stage in stages]
    return [stages[0] * model.var.sqrt(), *stages[1:]], report


@pytest.fixture(scope="module")
def digits():
    return open_flow("digits")[0]


def flow(name):
    if name == "digits":
        return open_flow("digits")[0]
    if name == "permuted":
        return random_tokens_flow(num_tokens=24, scale=0.1, num_classes=3, orders=[SHUFFLED, SHUFFLED[::-1]])
    return random_flow(scale=0.3, num_classes=3, nvp=name != "shift", layers_per_block=2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("guidance", [{}, GUIDED], ids=["plain", "guided"])
@pytest.mark.parametrize("name", ["digits", "permuted", "affine", "shift"])
def test_every_token_returned_satisfies_its_equation(backend, name, guidance):
    model = flow(name)
    model.backend, y = backend, torch.tensor([0, 1, -1, 2, 1])
    exact, _ = draw(model, 5, y, **guidance)
    # what float32 itself leaves, in the values of one token after another
    rounding = 4 * residuals(model, exact, y, **guidance).max() + 1e-6
    for window, tolerance in ((1, 1e-3), (5, 1e-2), (16, 1e-3), (100, 1e-4)):
        stages, report = draw(
            model, 5, y, **guidance, solver="windows", tolerance=tolerance, window=window, return_report=True
        )
        found = residuals(model, stages, y, **guidance)
        assert found.max() <= tolerance + rounding, (window, tolerance)
        # the report's own residuals are the judge's, row by row and block by block
        torch.testing.assert_close(report.residual.T.flip(0).double(), found.amax(dim=2), rtol=0, atol=float(rounding))
        steps, T = report.of(0)[0].accepted, model.num_tokens
        assert steps.sum(dim=0).tolist() == [T - 1] * 5
        assert all(passes <= T - 1 for passes in report.passes.values())
        if window == 1:
            assert report.residual.max() == 0 and found.max() <= rounding


def test_windows_take_fewer_passes_and_say_so(digits):
    _, report = draw(digits, 16, torch.arange(16) % 10, solver="windows", return_report=True)
    assert sum(report.passes.values()) <= 40 < 60 and not any(report.fallbacks.values())
    assert 1e-4 < report.residual.max() <= 1e-3  # tokens were accepted before they stood still
    _, plain = draw(digits, 16, torch.arange(16) % 10, solver="sequential", return_report=True)
    assert plain.passes == dict.fromkeys(range(4), 15) and plain.residual.max() == 0


def test_log_det_is_that_of_the_values_returned(digits):
    """The density of what was returned, computed by the forward pass, is the one told."""
    digits.backend = "auto"
    z, y = torch.randn(4, *digits.var.shape, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 2, 3, 4])
    block = digits.blocks[1].double()
    with Call("torch") as call:
        passes = open_passes(block.bijection, z.double(), y, Guidance(), call)
        steps = CommonSteps(passes, block.bijection)
        x, log_det, _ = solve_by_windows(steps, block.bijection, z.double(), 15, 1e-2)
    assert (block(x, y, mean=False)[1] + log_det).abs().max() < 1e-9
    assert (block(x, y, mean=False)[0] - z).abs().max() > 1e-6  # it is the inverse of another z, nearby
    block.float()


@NATIVE
@pytest.mark.every_isa
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("guidance", [Guidance(), Guidance(1.5, "ab", 0.8, True)], ids=["plain", "guided"])
def test_tolerance_zero_moves_no_bit(precision, guidance):
    for name in ("digits", "permuted", "shift"):
        model = flow(name)
        z = torch.randn(3, *model.var.shape, generator=torch.Generator().manual_seed(4))
        y = torch.tensor([0, 2, -1])
        with Call("cpu", precision) as call, torch.no_grad():
            for block in model.blocks:
                passes = open_passes(block.bijection, z, y, guidance, call)
                right = passes.solve(z)
                for window in (1, 4, 16, 100):
                    for guess in (guess_from_last, guess_noise):
                        steps = passes.steps(slice(0, 3), 3, min(window, z.size(1) - 1))
                        x, log_det, report = solve_by_windows(steps, block.bijection, z, window, 0.0, guess=guess)
                        assert same_bits(x, right[0]) and same_bits(log_det, right[1]), (name, window)
                        assert report.residual.max() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_token_needs_no_pass(backend):
    model = random_tokens_flow(num_tokens=1)
    model.backend = backend
    z = torch.randn(3, 1, 3)
    x, log_det, report = model.inverse(z, solver="windows", return_report=True)
    assert same_bits(x, z) and (log_det == 0).all() and report.passes == {0: 0, 1: 0}


def stiff(scale, **config):
    """A flow whose values depend so much on earlier ones that Jacobi's iterates run away before they settle."""
    return random_flow(scale=scale, img_size=(8, 16), **config)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_diverges_ends_in_the_sequential_answer_or_an_error(backend):
    z = torch.randn(6, 32, 4, generator=torch.Generator().manual_seed(1))
    arguments = {"solver": "windows", "tolerance": 1e-4, "window": 8}

    # Iterates of some rows overflow, and so do some rows in truth.
    model = stiff(0.25)
    model.backend = backend
    right = model.reverse(z, nonfinite="ignore")
    x, report = model.reverse(z, nonfinite="ignore", return_report=True, **arguments)
    finite, fallbacks = right.isfinite().flatten(1).all(dim=1), report.of(0)[0].fallbacks
    assert 0 < finite.sum() < 6 and (fallbacks[finite] > 0).any()
    assert (x.isfinite() == right.isfinite()).all()
    assert report.residual[finite].max() <= 1e-4 and report.residual[~finite].isnan().any(dim=1).all()
    with pytest.raises(NonFiniteError, match=r"^reverse: \d of 6 rows are not finite, first in block 0, row \d"):
        model.reverse(z, nonfinite="raise", **arguments)

    # Nothing is gained, so all is solved one token after another.
    model = stiff(0.7, nvp=False)
    model.backend = backend
    right = model.reverse(z)
    x, report = model.reverse(z, return_report=True, **arguments)
    assert all((part.fallbacks > 1).all() and part.single > 10 for _, part in report.parts)
    assert report.passes == {0: 31, 1: 31} and report.residual.max() == 0
    assert same_bits(x, right) if backend == "cpu" else (x - right).abs().max() < 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_that_overflows_does_not_hold_or_touch_the_others(backend, digits):
    digits.backend = backend
    z, y = torch.randn(3, *digits.var.shape, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 2, 3])
    spoiled = z.clone()
    spoiled[1, 7] = torch.inf
    arguments = {"solver": "windows", "tolerance": 1e-5, "return_report": True, "nonfinite": "ignore"}
    clean, _, _ = digits.inverse(z, y, **arguments)
    x, _, report = digits.inverse(spoiled, y, **arguments)
    right, _ = digits.inverse(spoiled, y, nonfinite="ignore")
    assert (x.isfinite() == right.isfinite()).all() and not x[1].isfinite().all()
    assert (x[[0, 2]] - clean[[0, 2]]).abs().max() < 1e-3
    assert report.residual[[0, 2]].max() <= 1e-5


def test_bad_arguments_are_refused_before_any_work(digits):
    z = torch.zeros(1, *digits.var.shape)
    for arguments, kind, message in (
        ({"solver": "jacobi"}, ValueError, "inverse: solver must be one of auto, sequential, windows, got 'jacobi'"),
        ({"tolerance": -1.0}, ValueError, "inverse: tolerance must be finite and >= 0, got -1.0"),
        ({"tolerance": float("nan")}, ValueError, "inverse: tolerance must be finite and >= 0, got nan"),
        ({"tolerance": "1"}, TypeError, "inverse: tolerance must be a number, got str"),
        ({"window": 0}, ValueError, "inverse: window must be"),
        ({"solver": "windows", "differentiable": True}, ValueError, "inverse: solver 'windows' has no gradient"),
    ):
        with pytest.raises(kind, match="^" + message.replace("(", r"\(")):
            digits.inverse(z, **arguments)


@NATIVE
@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("guidance", [{}, GUIDED], ids=["plain", "guided"])
def test_a_row_depends_on_no_other(precision, guidance):
    """Rows move on by themselves: alone and among others a row has the same bits, passes and residual."""
    model = stiff(0.27)
    model.backend = "cpu"
    z = torch.randn(7, *model.var.shape, generator=torch.Generator().manual_seed(1))
    z[3] *= 0.1
    arguments = dict(guidance, solver="windows", tolerance=1e-2, window=8, precision=precision, return_report=True)
    together, report = model.reverse(z, nonfinite="ignore", **arguments)
    steps = [torch.stack([part.accepted for part in report.of(k)]).squeeze(0) for k in (0, 1)]
    for row in range(7):
        alone, own = model.reverse(z[row : row + 1], nonfinite="ignore", **arguments)
        assert same_bits(alone, together[row : row + 1])
        assert same_bits(own.residual, report.residual[row : row + 1])
        for k in (0, 1):
            taken = steps[k][:, row]
            assert taken[taken > 0].tolist() == own.of(k)[0].accepted[:, 0].tolist()
            assert own.of(k)[0].fallbacks.tolist() == report.of(k)[0].fallbacks[row : row + 1].tolist()
    counts = (steps[1] > 0).sum(dim=0)
    assert counts.min() < counts.max() <= model.num_tokens - 1  # the rows do differ in what they take
    assert sum(report.fallbacks.values()) > 0 and 0 < bad_rows(together).sum() < 7


@NATIVE
def test_batches_in_parts_have_the_same_bits(digits, monkeypatch):
    digits.backend = "auto"
    z, y = torch.randn(9, *digits.var.shape, generator=torch.Generator().manual_seed(0)), torch.arange(9)
    ticks = []
    arguments = {"solver": "windows", "tolerance": 1e-3, "return_report": True}
    whole, log_det, report = digits.inverse(z, y, **arguments)
    monkeypatch.setattr("tarflow_fast.engines.cpu.PASS_ROWS", 60)
    parts, log_det_of_parts, reported = digits.inverse(z, y, **arguments)
    assert len(report.of(0)) == 1 and len(reported.of(0)) == 3
    assert same_bits(whole, parts) and same_bits(log_det, log_det_of_parts)
    assert same_bits(report.residual, reported.residual)
    with Call("cpu", solving=Solving("inverse", "windows")) as call:
        invert(digits.blocks[0].bijection, z, y, Guidance(), call, lambda: ticks.append(1))
    assert len(ticks) == digits.num_tokens - 1


@NATIVE
@pytest.mark.every_isa
def test_tolerance_zero_is_the_sequential_answer_of_the_whole_model(digits):
    digits.backend = "cpu"
    y = torch.tensor([3, 1, -1])
    for arguments in ({}, GUIDED, {"guidance": 2.0, "guide_what": "b"}):
        right = digits.sample_and_log_prob(3, y, seed=1, **arguments)
        got = digits.sample_and_log_prob(3, y, seed=1, solver="windows", tolerance=0, window=7, **arguments)
        assert all(same_bits(a, b) for a, b in zip(got, right, strict=True))


@NATIVE
def test_a_frozen_model_and_a_narrow_one(digits):
    """The packed weights of `freeze` serve windows too; a bfloat16 model computes in float32 tokens."""
    model = open_flow("digits")[0]
    y = torch.tensor([3, 1])
    free = model.sample(2, y, seed=1, solver="windows")
    assert same_bits(model.freeze().sample(2, y, seed=1, solver="windows"), free)
    narrow = model.unfreeze().bfloat16()
    exact = narrow.sample(2, y, seed=1)
    x = narrow.sample(2, y, seed=1, solver="windows", tolerance=0)
    assert x.dtype == torch.bfloat16 and same_bits(x, exact)


@NATIVE
@pytest.mark.every_isa
@pytest.mark.parametrize("guidance", [{}, GUIDED], ids=["plain", "guided"])
@pytest.mark.parametrize("draft, precision", [("bf16", "fp32"), ("int8", "fp32"), ("int8", "bf16")])
def test_drafts_save_passes_and_keep_the_promise(digits, draft, precision, guidance):
    digits.backend, y = "cpu", torch.tensor([0, 1, -1, 2, 1])
    arguments = dict(guidance, solver="windows", window=8, precision=precision)
    exact = digits.sample(5, y, seed=3, **guidance, precision=precision)
    zero = digits.sample(5, y, seed=3, tolerance=0, draft=draft, **arguments)
    assert same_bits(zero, exact)
    stages, report = draw(digits, 5, y, tolerance=1e-2, draft=draft, return_report=True, **arguments)
    _, guessed = draw(digits, 5, y, tolerance=1e-2, return_report=True, **arguments)
    assert sum(report.passes.values()) < sum(guessed.passes.values())
    assert report.residual.max() <= 1e-2
    if precision == "fp32":  # the plain reference judges values computed in fp32
        assert residuals(digits, stages, y, **guidance).max() <= 1e-2 + 1e-5


@NATIVE
def test_a_draft_that_overflows_is_left_where_it_does(digits):
    """Rows whose draft is not finite are solved all the same, and have the bits that they have alone."""
    digits.backend = "cpu"
    z = torch.randn(3, *digits.var.shape, generator=torch.Generator().manual_seed(0))
    exact = digits.reverse(z, solver="sequential")
    bijection = digits.blocks[-1].bijection
    with Call("cpu") as call, torch.no_grad():
        passes = open_passes(bijection, z, None, Guidance(), call)
        right, _ = passes.solve(z)
        draft = right.clone()
        draft[1, 3:] = torch.inf
        draft[2, 5] = torch.nan
        for tolerance in (0.0, 1e-3):
            steps = passes.steps(slice(0, 3), 3, 8)
            x, _, report = solve_by_windows(steps, bijection, z, 8, tolerance, draft=draft)
            assert (x - right).abs().max() <= 5 * tolerance and not report.residual.isnan().any()
        assert same_bits(solve_by_windows(steps, bijection, z, 8, 0.0, draft=right)[0], right)
    assert exact.isfinite().all()


def test_drafts_are_refused_where_none_can_be_made(digits):
    z = torch.zeros(1, *digits.var.shape)
    with pytest.raises(ValueError, match=r"^inverse: draft must be None or one of bf16, int8, got 'fp16'"):
        digits.inverse(z, draft="fp16")
    digits.backend = "torch"
    with pytest.raises(RuntimeError, match=r"^inverse: draft='bf16' needs the native CPU engine.* block 3 here"):
        digits.inverse(z, solver="windows", draft="bf16")
    digits.backend = "auto"
    if native.available():
        with pytest.raises(ValueError, match=r"draft must be a cheaper precision than bf16, .* got 'bf16'"):
            digits.inverse(z, solver="windows", precision="bf16", draft="bf16")
