"""The op affine: values, gradients, laws, bits and errors of every backend that this process can run."""

import os

import numpy as np
import pytest
import torch
from cases import AFFINE_CASES, AffineCase, affine_inputs
from compare import assert_accurate, same_bits

from tarflow_fast import native_cuda
from tarflow_fast.ops import affine, affine_ref
from tarflow_fast.ops.affine import _OP, DTYPES, affine_backward_ref

IDS = ["-".join(str(dtype).removeprefix("torch.") for dtype in pair) for pair in DTYPES]
LARGE = AffineCase(3, 2000, 12, flip=True)


def pytest_generate_tests(metafunc):
    if "backend" not in metafunc.fixturenames:
        return
    # tests/test_processes.py starts processes with an interpreter or another instruction set. Those test only the
    # backend that such a setting changes.
    if os.environ.get("TRITON_INTERPRET") == "1":
        names = ["triton"]
    elif os.environ.get("TARFLOW_CPU_ISA"):
        names = ["cpu"]
    else:
        names = {"cpu": ["torch", "cpu"], "cuda": ["torch", "triton"]}[metafunc.config.getoption("--device")]
        names += [] if names[1] == "cpu" or native_cuda.missing() else ["cuda"]
    metafunc.parametrize("backend", names)


def grads(outputs, inputs, directions):
    return torch.autograd.grad(outputs, inputs, directions, allow_unused=True, materialize_grads=True)


def everything(backend, x, ab, dz, dlog_det, flip=True):
    """The outputs and gradients (z, log_det, dx, dab) of one backend."""
    leaves = [t.detach().requires_grad_() for t in (x, ab)]
    z, log_det = affine(*leaves, flip, backend)
    # When ab holds b alone, log_det is a constant, and plain PyTorch has no gradient for it at all.
    outputs, pull = ((z, log_det), (dz, dlog_det)) if log_det.requires_grad else ((z,), (dz,))
    return z.detach(), log_det.detach(), *grads(outputs, leaves, pull)


def truth(case, x, ab, dz, dlog_det):
    """(z, log_det, dx, dab) in numpy's widest floats. Each is a pair (high, low) of float64 tensors to be added."""
    x, ab, dz, dlog_det = (t.double().cpu().numpy().astype(np.longdouble) for t in (x, ab, dz, dlog_det))
    order = slice(None, None, -1 if case.flip else 1)
    x, dz, D = x[:, order], dz[:, order], case.D
    b = ab[:, :-1, -D:]
    a = ab[:, :-1, :D] if case.scale else np.zeros_like(b)
    z, dx, dab = x.copy(), dz.copy(), np.zeros_like(ab)
    z[:, 1:] = (x[:, 1:] - b) * np.exp(-a)
    dx[:, 1:] = dz[:, 1:] * np.exp(-a)
    dab[:, :-1, -D:] = -dx[:, 1:]
    if case.scale:
        dab[:, :-1, :D] = -dz[:, 1:] * z[:, 1:] - dlog_det[:, None, None]
    exact = (z[:, order], -a.sum((1, 2)), dx[:, order], dab)
    high = [np.ascontiguousarray(t).astype(np.float64) for t in exact]
    return [
        (torch.from_numpy(h), torch.from_numpy((t - h).astype(np.float64))) for t, h in zip(exact, high, strict=True)
    ]


@pytest.mark.every_isa
@pytest.mark.interpreter
@pytest.mark.parametrize("dtypes", DTYPES, ids=IDS)
@pytest.mark.parametrize("case", AFFINE_CASES, ids=str)
def test_values_and_gradients(case, dtypes, backend, device):
    if why_not := _OP.why_not(backend, device, dtypes[0]):
        pytest.skip(why_not)
    if os.environ.get("TRITON_INTERPRET") == "1" and case.T * case.D > 4000 and dtypes not in DTYPES[:2]:
        pytest.skip("the other sizes show every type, and the large ones show large sizes")
    inputs = affine_inputs(case, dtypes, device)
    got = everything(backend, *inputs, case.flip)
    plain = everything("torch", *inputs, case.flip)
    assert not got[3][:, -1:].any(), "the last row of ab conditions nothing, so its gradient must be 0"
    outputs = dict(zip(("z", "log_det", "dx", "dab"), zip(got, truth(case, *inputs), plain, strict=True), strict=True))
    if case.B:  # a log_det is one number per row, so it is judged on more rows
        more = case._replace(B=96 if backend == "cpu" else 24)
        inputs = affine_inputs(more, dtypes, device)
        ours, theirs = (affine(*inputs[:2], case.flip, each)[1] for each in (backend, "torch"))
        outputs["log_det"] = ours, truth(more, *inputs)[1], theirs
    for name, (value, exact, reference) in outputs.items():
        assert_accurate(name, value.cpu(), exact, reference.cpu())


@pytest.mark.every_isa
@pytest.mark.interpreter
def test_non_contiguous(backend, device):
    case = AffineCase(3, 6, 5)
    x, ab, dz, dlog_det = affine_inputs(case, device=device)
    views = x.transpose(0, 1).contiguous().transpose(0, 1), ab.repeat_interleave(2, dim=2)[..., ::2]
    assert not views[0].is_contiguous() and not views[1].is_contiguous()
    leaves = [view.requires_grad_() for view in views]
    z, log_det = affine(*leaves, backend=backend)
    assert z.is_contiguous()
    expected = affine(x, ab, backend=backend)
    assert same_bits(z, expected[0]) and same_bits(log_det, expected[1])
    dx, dab = grads((z, log_det), leaves, (dz.mT.contiguous().mT, dlog_det[:1].expand(3)))
    straight = [t.detach().contiguous().requires_grad_() for t in (x, ab)]
    expected = grads(affine(*straight, backend=backend), straight, (dz, dlog_det[:1].repeat(3)))
    assert same_bits(dx, expected[0]) and same_bits(dab, expected[1])


# ---- laws ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flip", [False, True])
def test_solving_token_by_token_gives_x_back(backend, flip, device):
    x, ab, _, _ = affine_inputs(AffineCase(2, 6, 4), (torch.float64, torch.float64), device)
    z, log_det = affine(x, ab, flip, backend)
    order = list(reversed(range(6))) if flip else list(range(6))
    solved = torch.empty_like(z)
    solved[:, order[0]] = z[:, order[0]]
    for i in range(5):
        a, b = ab[:, i].chunk(2, dim=-1)
        solved[:, order[i + 1]] = z[:, order[i + 1]] * a.exp() + b
    torch.testing.assert_close(solved, x, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(log_det, -ab[:, :5, :4].sum((1, 2)), rtol=1e-13, atol=1e-13)


def test_log_det_is_that_of_the_jacobian(backend, device):
    x, ab, _, _ = affine_inputs(AffineCase(1, 4, 3), (torch.float64, torch.float64), device)
    jacobian = torch.autograd.functional.jacobian(lambda x: affine(x, ab, True, backend)[0], x).reshape(12, 12)
    torch.testing.assert_close(torch.linalg.slogdet(jacobian).logabsdet, affine(x, ab, True, backend)[1][0])


def test_flip_is_the_flip_of_the_tokens(backend, device):
    x, ab, _, _ = affine_inputs(AffineCase(2, 7, 5), device=device)
    z, log_det = affine(x, ab, True, backend)
    mirrored, same_log_det = affine(x.flip(1), ab, False, backend)
    assert same_bits(z, mirrored.flip(1)) and same_bits(log_det, same_log_det)


def test_without_scale_is_scale_zero(backend, device):
    x, b, _, _ = affine_inputs(AffineCase(2, 7, 5, scale=False), device=device)
    z, log_det = affine(x, b, backend=backend)
    assert same_bits(z, affine(x, torch.cat([torch.zeros_like(b), b], dim=2), backend=backend)[0])
    assert same_bits(log_det, torch.zeros_like(log_det))


def test_last_row_of_ab_is_ignored_even_if_nan(backend, device):
    x, ab, _, _ = affine_inputs(AffineCase(2, 4, 5), device=device)
    z, log_det = affine(x, ab, backend=backend)
    ab[:, -1] = torch.nan
    again, log_det_again = affine(x, ab, backend=backend)
    assert same_bits(z, again) and same_bits(log_det, log_det_again)


@pytest.mark.every_isa
@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # the interpreter is numpy, which warns
def test_nan_and_overflow_stay_in_their_row(backend, device):
    x, ab, _, _ = affine_inputs(AffineCase(3, 40, 20), device=device)
    clean, clean_log_det = affine(x, ab, backend=backend)
    ab[0, 3, 2], ab[2, 5, 19] = torch.nan, -200.0
    z, log_det = affine(x, ab, backend=backend)
    assert z[0, 4, 2].isnan() and z[2, 6, 19].isinf() and log_det[0].isnan()
    z[0, 4, 2], z[2, 6, 19] = clean[0, 4, 2], clean[2, 6, 19]
    assert same_bits(z, clean) and same_bits(log_det[1], clean_log_det[1])


# ---- bits ----------------------------------------------------------------------------------------------------------


@pytest.mark.every_isa
@pytest.mark.parametrize("dtypes", DTYPES, ids=IDS)
def test_bits_do_not_depend_on_threads(dtypes, threads):
    inputs = affine_inputs(LARGE, dtypes)
    threads(1)
    expected = everything("cpu", *inputs)
    for count in (2, 3, 7):
        threads(count)
        assert all(map(same_bits, everything("cpu", *inputs), expected)), count


@pytest.mark.every_isa
@pytest.mark.interpreter
def test_bits_do_not_depend_on_the_batch(backend, device):
    case = AffineCase(5, 300, 12) if backend == "triton" else AffineCase(5, 2000, 12)
    inputs = affine_inputs(case, device=device)
    together = everything(backend, *inputs)
    if backend == "torch":
        return  # PyTorch's sums make no such promise
    for rows in ([3], [4, 0]):
        alone = everything(backend, *(t[rows] for t in inputs))
        assert all(same_bits(a, t[rows]) for a, t in zip(alone, together, strict=True)), rows


def test_bits_are_the_same_a_thousand_times(threads):
    x, ab, dz, dlog_det = affine_inputs(LARGE._replace(B=1))
    expected = everything("cpu", x, ab, dz, dlog_det)
    for run in range(1000):
        threads(1 + run % 5 // 4)
        if run % 2:
            got = affine(x, ab, True, "cpu")
            assert same_bits(got[0], expected[0]) and same_bits(got[1], expected[1])
        else:
            got = torch.ops.tarflow_fast.affine_backward(dz, dlog_det, x, ab, True, "cpu")
            assert same_bits(got[0], expected[2]) and same_bits(got[1], expected[3])


# ---- torch ---------------------------------------------------------------------------------------------------------


def leaves_of(case, dtype=torch.float64, device="cpu"):
    return [t.requires_grad_() for t in affine_inputs(case, (dtype, dtype), device)[:2]]


@pytest.mark.parametrize("case", [AffineCase(2, 4, 3, flip=True), AffineCase(2, 3, 2, scale=False)], ids=str)
def test_gradcheck(case, backend, device):
    x, ab = leaves_of(case, device=device)
    assert torch.autograd.gradcheck(lambda x, ab: affine(x, ab, case.flip, backend), (x, ab))


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
@pytest.mark.parametrize("part", [0, 1])
def test_partial_gradients(needs, part, backend, device):
    x, ab, dz, dlog_det = affine_inputs(AffineCase(2, 4, 3), device=device)
    x.requires_grad_(needs[0]), ab.requires_grad_(needs[1])
    inputs, pull = [t for t in (x, ab) if t.requires_grad], (dz, dlog_det)[part]
    if needs[0] and part == 1:
        return  # log_det does not depend on x
    (got,) = grads(affine(x, ab, backend=backend)[part], inputs, pull)
    (expected,) = grads(affine_ref(x, ab)[part], inputs, pull)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_opcheck(dtype, backend, device):
    if why_not := _OP.why_not(backend, device, dtype):
        pytest.skip(why_not)
    x, ab = leaves_of(AffineCase(2, 4, 3), dtype, device)
    torch.library.opcheck(torch.ops.tarflow_fast.affine.default, (x, ab, True, backend))
    saved = affine(x.detach(), ab.detach(), True, backend)
    torch.library.opcheck(
        torch.ops.tarflow_fast.affine_backward.default, (*saved, x.detach(), ab.detach(), True, backend)
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic, backend, device):
    def loss(x, ab):
        z, log_det = affine(x, ab, True, backend)
        return 0.5 * z.square().mean() - log_det.mean()

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for T in (4, 6):
        x, ab = leaves_of(AffineCase(2, T, 3), torch.float32, device)
        torch.testing.assert_close(grads(compiled(x, ab), (x, ab), None), grads(loss(x, ab), (x, ab), None))


def test_transforms_take_the_plain_form():
    x, ab = (t.detach() for t in leaves_of(AffineCase(3, 4, 2)))
    batched = torch.func.vmap(lambda x, ab: affine(x[None], ab[None])[0][0])(x, ab)
    torch.testing.assert_close(batched, affine(x, ab)[0])
    jacobian = torch.func.jacrev(lambda ab: affine(x, ab)[1].sum())(ab)
    torch.testing.assert_close(jacobian[:, :-1, :2], torch.full((3, 3, 2), -1.0, dtype=torch.float64))
    direction = torch.randn_like(x)
    _, pushed = torch.func.jvp(lambda x: affine(x, ab)[0], (x,), (direction,))
    torch.testing.assert_close(pushed, affine_ref(direction, ab.clone().mul_(torch.tensor([1.0, 1, 0, 0])))[0])
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, direction)
        tangent = torch.autograd.forward_ad.unpack_dual(affine(dual, ab)[0]).tangent
    torch.testing.assert_close(tangent, pushed)


def test_second_derivative():
    x, ab = leaves_of(AffineCase(2, 3, 2))
    (first,) = torch.autograd.grad(affine(x, ab)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"^affine: only backend 'torch' has a second derivative"):
        first.sum().backward()
    assert torch.autograd.gradgradcheck(lambda x, ab: affine(x, ab, backend="torch"), (x, ab))


def test_backward_reference_is_the_gradient():
    x, ab, dz, dlog_det = affine_inputs(AffineCase(2, 5, 3), (torch.float64, torch.float64))
    leaves = [x.requires_grad_(), ab.requires_grad_()]
    expected = grads(affine_ref(*leaves, True), leaves, (dz, dlog_det))
    torch.testing.assert_close(affine_backward_ref(dz, dlog_det, x.detach(), ab.detach(), True), expected)


# ---- errors --------------------------------------------------------------------------------------------------------

X, AB = torch.zeros(2, 5, 3), torch.zeros(2, 5, 6)
SHAPES = "affine: ab must have shape (B, T, 2D) or (B, T, D) = (2, 5, 6) or (2, 5, 3), got "
TOKENS = "affine: x must have shape (B, T, D) with T >= 1 and D >= 1, got "
PAIRS = (
    "affine: (x, ab) must have dtypes (float64, float64), (float32, float32), (float32, bfloat16), "
    "(float32, float16), (bfloat16, bfloat16), (float16, float16), got "
)
ERRORS = [
    ((X[0], AB), ValueError, TOKENS + "(5, 3)"),
    ((X[:, :0], AB[:, :0]), ValueError, TOKENS + "(2, 0, 3)"),
    ((X[:, :, :0], AB[:, :, :0]), ValueError, TOKENS + "(2, 5, 0)"),
    ((X, AB[:, 1:]), ValueError, SHAPES + "(2, 4, 6)"),
    ((X, AB[:1]), ValueError, SHAPES + "(1, 5, 6)"),
    ((X, AB[..., :5]), ValueError, SHAPES + "(2, 5, 5)"),
    ((X, AB[0]), ValueError, SHAPES + "(5, 6)"),
    ((X.double(), AB), TypeError, PAIRS + "(float64, float32)"),
    ((X.bfloat16(), AB), TypeError, PAIRS + "(bfloat16, float32)"),
    ((X.long(), AB.long()), TypeError, PAIRS + "(int64, int64)"),
    (([1.0], AB), TypeError, "affine: x must be a torch.Tensor, got list"),
    ((X, None), TypeError, "affine: ab must be a torch.Tensor, got NoneType"),
    ((X, AB.to_sparse()), TypeError, "affine: ab must be a dense tensor, got layout torch.sparse_coo"),
    ((X, AB, 1), TypeError, "affine: flip must be a bool, got int"),
    ((X, AB.to("meta")), ValueError, "affine: ab must be on the device of x, cpu, got meta"),
    ((X, AB, False, "gpu"), ValueError, "affine: backend must be one of auto, torch, cpu, triton, cuda, got 'gpu'"),
    (
        (X, AB, False, "triton"),
        RuntimeError,
        "affine: backend 'triton' cannot run: it needs GPU tensors, or TRITON_INTERPRET=1 for CPU tensors, got cpu",
    ),
    ((X, AB, False, "cuda"), RuntimeError, "affine: backend 'cuda' cannot run: it needs GPU tensors, got cpu"),
]


@pytest.mark.parametrize("arguments, kind, message", ERRORS, ids=[message[-40:] for _, _, message in ERRORS])
def test_errors(arguments, kind, message):
    with pytest.raises(kind) as caught:
        affine(*arguments)
    assert str(caught.value) == message


def test_backward_checks_its_gradients():
    with pytest.raises(ValueError) as caught:
        torch.ops.tarflow_fast.affine_backward(X[:1], torch.zeros(2), X, AB, False, "cpu")
    assert str(caught.value) == (
        "affine_backward: dz must have the shape, dtype and device of x, (2, 5, 3), torch.float32, cpu, "
        "got (1, 5, 3), torch.float32, cpu"
    )
