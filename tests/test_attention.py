"""The op attention: values, gradients, causality, bits and errors of every backend that this process can run."""

import os

import pytest
import torch
from cases import ATTENTION_CASES, AttentionCase, attention_inputs
from compare import assert_accurate, same_bits

from tarflow_fast.ops import attention, attention_qkv, attention_ref
from tarflow_fast.ops.attention import _OP, _readable

BACKENDS = ["triton"] if os.environ.get("TRITON_INTERPRET") == "1" else ["torch", "triton"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CASE = AttentionCase(1, 37, 2, 16)


@pytest.fixture(params=BACKENDS)
def backend(request, device):
    if why_not := _OP.why_not(request.param, device, torch.float32):
        pytest.skip(why_not)
    return request.param


@pytest.fixture(params=["tuned", "small"])
def tiles(request, backend, monkeypatch):
    """Runs a test with the tiles of tuning.py, and with tiles so small that every loop runs several times."""
    if request.param == "small":
        if backend != "triton":
            pytest.skip("PyTorch has no tiles")
        from tarflow_fast.kernels.triton import tuning

        monkeypatch.setattr(tuning, "attention", lambda *shape: tuning.Tiles(32, 16, 4, 1))
    return request.param


def everything(backend, qkv, dout, temperature=1.0):
    """The output and the gradient (out, dqkv) of one backend."""
    qkv = qkv.detach().requires_grad_()
    out = attention_qkv(qkv, temperature, backend)
    return out.detach(), torch.autograd.grad(out, qkv, dout)[0]


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ATTENTION_CASES, ids=str)
def test_values_and_gradients(case, dtype, backend, tiles, device):
    if why_not := _OP.why_not(backend, device, dtype):
        pytest.skip(why_not)
    inputs = attention_inputs(case, dtype, device)
    got = everything(backend, *inputs, case.temperature)
    plain = everything("torch", *inputs, case.temperature)
    truth = everything("torch", *(t.double().cpu() for t in inputs), case.temperature)
    for name, value, exact, reference in zip(("out", "dqkv"), got, truth, plain, strict=True):
        assert_accurate(name, value.cpu(), exact, reference.cpu())


@pytest.mark.interpreter
def test_definition(backend, device):
    case = AttentionCase(2, 9, 2, 16, 0.7)
    qkv, _ = attention_inputs(case, device=device)
    query, key, value = qkv.double().unbind(2)
    logits = torch.einsum("bthe,bshe->bhts", query, key) / (16**0.5 * 0.7)
    logits = logits.masked_fill(torch.ones(9, 9, dtype=torch.bool, device=device).triu(1), -torch.inf)
    expected = torch.einsum("bhts,bshe->bthe", logits.softmax(-1), value)
    torch.testing.assert_close(attention_qkv(qkv, 0.7, backend).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.interpreter
def test_three_tensors_or_one(backend, device):
    qkv, dout = attention_inputs(CASE, device=device)
    expected = everything(backend, qkv, dout)
    parts = [t.detach().requires_grad_() for t in qkv.unbind(2)]
    assert all(a is b for a, b in zip(_readable(*parts), parts, strict=True)), "views of one tensor need no copy"
    heads_first = [t.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for t in qkv.detach().unbind(2)]
    uneven = [*(t.detach().requires_grad_() for t in qkv.unbind(2)[:2]), heads_first[2].detach().requires_grad_()]
    for leaves in (parts, heads_first, uneven):
        out = attention(*leaves, backend=backend)
        assert out.is_contiguous() and same_bits(out, expected[0])
        mixed = dout.transpose(1, 2).contiguous().transpose(1, 2)
        gradients = torch.autograd.grad(out, leaves, mixed)
        assert same_bits(torch.stack(gradients, dim=2), expected[1])


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_token(dtype, backend, device):
    if why_not := _OP.why_not(backend, device, dtype):
        pytest.skip(why_not)
    qkv, dout = attention_inputs(AttentionCase(2, 1, 2, 64), dtype, device)
    out, dqkv = everything(backend, qkv, dout)
    # The weight of a single token is 1. On a GPU it is 1 but for a rounding, because (logit scale) - (logit scale) is
    # rounded once there, not twice.
    rounding = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 0}
    torch.testing.assert_close((out, dqkv[:, :, 2]), (qkv[:, :, 2], dout), **rounding)
    # dq and dk are 0 but for rounding. Each is a difference of two sums of the same 64 products, and each of these sums
    # is off by at most 64 roundings of its products.
    query, key, value = qkv.double().unbind(2)
    off = 2 * 64 * 2**-24 * (value * dout.double()).abs().sum(-1, keepdim=True) / 64**0.5
    assert (dqkv[:, :, 0].abs() <= off * key.abs()).all() and (dqkv[:, :, 1].abs() <= off * query.abs()).all()


# ---- laws ----------------------------------------------------------------------------------------------------------


@pytest.mark.interpreter
def test_no_token_sees_a_later_one(backend, tiles, device):
    qkv, dout = attention_inputs(AttentionCase(1, 70, 1, 16), device=device)
    out, _ = everything(backend, qkv, dout)
    changed = qkv.clone()
    changed[:, 41:] += 1
    assert same_bits(attention_qkv(changed, 1.0, backend)[:, :41], out[:, :41])
    dout[:, 41:] = 0
    _, partly = everything(backend, qkv, dout)
    assert not partly[:, 41:].any() and partly[:, :41].any()


@pytest.mark.interpreter
def test_rows_of_one_key_give_that_value(backend, device):
    qkv, _ = attention_inputs(CASE, device=device)
    qkv[:, :, 2] = qkv[:, :1, 2]
    torch.testing.assert_close(attention_qkv(qkv, 1.0, backend), qkv[:, :, 2])


@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter computes with numpy, which warns
def test_large_logits_and_nan(backend, tiles, device):
    qkv, dout = attention_inputs(AttentionCase(3, 36, 2, 16), device=device)
    clean, dclean = everything(backend, qkv, dout)
    qkv[1, :, :2] *= 200  # logits of 1e5 would overflow an unshifted exp
    qkv[0, 25, 1, 1] = torch.nan
    out, dqkv = everything(backend, qkv, dout)
    assert out[1].isfinite().all() and dqkv[1].isfinite().all()
    assert out[0, 25:, 1].isnan().all() and dqkv[0, 25, 1, 1].isnan().all()
    assert same_bits(out[2], clean[2]) and same_bits(dqkv[2], dclean[2]), "a NaN must reach no other row"
    assert same_bits(out[0, :25], clean[0, :25]), "a NaN in a key must reach no earlier token"
    assert same_bits(out[0, :, 0], clean[0, :, 0]) and same_bits(dqkv[0, :, :, 0], dclean[0, :, :, 0])


# ---- bits ----------------------------------------------------------------------------------------------------------


@pytest.mark.interpreter
def test_bits_do_not_depend_on_the_batch(backend, tiles, device):
    if backend == "torch":
        pytest.skip("PyTorch makes no such promise")
    inputs = attention_inputs(AttentionCase(3, 40, 1, 16), device=device)
    together = everything(backend, *inputs)
    assert all(map(same_bits, everything(backend, *inputs), together))
    for rows in ([1], [2, 0]):
        alone = everything(backend, *(t[rows] for t in inputs))
        assert all(same_bits(a, t[rows]) for a, t in zip(alone, together, strict=True)), rows


@pytest.mark.interpreter
def test_bits_do_not_depend_on_the_order_of_work(backend, device, monkeypatch):
    if backend != "triton":
        pytest.skip("PyTorch orders its own work")
    from tarflow_fast.kernels.triton import tuning

    inputs = attention_inputs(AttentionCase(1, 40, 3, 16), device=device)
    monkeypatch.setattr(tuning, "attention", lambda *shape: tuning.Tiles(32, 32, 4, 1))
    expected = everything(backend, *inputs)
    for together in (1, 2):  # there are 3 heads, so a last group of 2 is not full
        monkeypatch.setattr(tuning, "attention_heads_together", lambda *shape, count=together: count)
        assert all(map(same_bits, everything(backend, *inputs), expected)), together


# ---- torch ---------------------------------------------------------------------------------------------------------


@pytest.mark.interpreter
def test_opcheck(backend, device):
    if backend == "torch":
        pytest.skip("the plain form does not go through the op")
    qkv = attention_inputs(AttentionCase(1, 5, 1, 16), device=device)[0].requires_grad_()
    ops = torch.ops.tarflow_fast
    torch.library.opcheck(ops.attention_qkv.default, (qkv, 0.7, backend))
    parts = tuple(t.detach().clone().requires_grad_() for t in qkv.unbind(2))
    quick = ("test_schema", "test_autograd_registration", "test_faketensor")  # the other utils would test the same code
    torch.library.opcheck(ops.attention.default, (*parts, 0.7, backend), test_utils=quick)
    saved = ops.attention.default(*(t.detach() for t in parts), 0.7, backend)
    arguments = (torch.ones_like(saved[0]), *(t.detach() for t in parts), *saved, 0.7, backend)
    torch.library.opcheck(ops.attention_backward.default, arguments, test_utils=quick)


@pytest.mark.interpreter
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic, backend, device):
    def loss(qkv):
        return attention_qkv(qkv, 1.0, backend).square().mean()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for T in (5, 7):
        qkv = attention_inputs(AttentionCase(2, T, 1, 16), device=device)[0].requires_grad_()
        (got,), (expected,) = (torch.autograd.grad(f(qkv), qkv) for f in (compiled, loss))
        torch.testing.assert_close(got, expected)


def test_auto_on_a_cpu_is_the_plain_form():
    qkv, _ = attention_inputs(AttentionCase(3, 6, 2, 24), torch.float64)
    assert same_bits(attention_qkv(qkv), attention_ref(*qkv.unbind(2)))
    qkv = qkv[:1, :3, :, :1, :2].clone().requires_grad_()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert torch.autograd.gradgradcheck(attention_qkv, qkv)


def test_transforms_take_the_plain_form():
    qkv, _ = attention_inputs(AttentionCase(3, 6, 2, 16), torch.float64)
    batched = torch.func.vmap(lambda qkv: attention_qkv(qkv[None])[0])(qkv)
    torch.testing.assert_close(batched, attention_qkv(qkv))
    direction = torch.randn_like(qkv)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        _, pushed = torch.func.jvp(attention_qkv, (qkv,), (direction,))
        _, expected = torch.autograd.functional.jvp(attention_qkv, qkv, direction)
    torch.testing.assert_close(pushed, expected)


@pytest.mark.interpreter
def test_second_derivative_is_refused(backend, device):
    if backend == "torch":
        pytest.skip("PyTorch has its own second derivative")
    qkv = attention_inputs(AttentionCase(1, 3, 1, 16), device=device)[0].requires_grad_()
    (first,) = torch.autograd.grad(attention_qkv(qkv, 1.0, backend).sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match=r"^attention: only backend 'torch' has a second derivative"):
        first.sum().backward()


# ---- errors --------------------------------------------------------------------------------------------------------

Q = torch.zeros(2, 5, 3, 16)
SHAPE = "attention: query must have shape (B, T, H, E) with T, H and E >= 1, got "
ERRORS = [
    ((Q[0], Q, Q), ValueError, SHAPE + "(5, 3, 16)"),
    ((Q[:, :0], Q, Q), ValueError, SHAPE + "(2, 0, 3, 16)"),
    ((Q, Q[:, 1:], Q), ValueError, "attention: key must have the shape of query, (2, 5, 3, 16), got (2, 4, 3, 16)"),
    ((Q, Q, Q[:1]), ValueError, "attention: value must have the shape of query, (2, 5, 3, 16), got (1, 5, 3, 16)"),
    ((Q, Q.half(), Q), TypeError, "attention: key must have the dtype of query, torch.float32, got torch.float16"),
    ((Q.long(),) * 3, TypeError, "attention: query must have a floating dtype, got torch.int64"),
    ((Q, Q, Q.to("meta")), ValueError, "attention: value must be on the device of query, cpu, got meta"),
    (([1.0], Q, Q), TypeError, "attention: query must be a torch.Tensor, got list"),
    ((Q, Q, Q, 0.0), ValueError, "attention: temperature must be finite and > 0, got 0.0"),
    ((Q, Q, Q, float("nan")), ValueError, "attention: temperature must be finite and > 0, got nan"),
    ((Q, Q, Q, "1"), TypeError, "attention: temperature must be a number, got str"),
    ((Q, Q, Q, 1.0, "gpu"), ValueError, "attention: backend must be one of auto, torch, cpu, triton, cuda, got 'gpu'"),
    ((Q, Q, Q, 1.0, "cpu"), RuntimeError, "attention: backend 'cpu' cannot run: attention has no cpu kernel"),
]


@pytest.mark.parametrize("arguments, kind, message", ERRORS, ids=[message[-40:] for _, _, message in ERRORS])
def test_errors(arguments, kind, message):
    with pytest.raises(kind) as caught:
        attention(*arguments)
    assert str(caught.value) == message


def test_errors_of_the_packed_form():
    with pytest.raises(ValueError) as caught:
        attention_qkv(Q)
    assert str(caught.value) == "attention_qkv: qkv must have shape (B, T, 3, H, E), got (2, 5, 3, 16)"
    with pytest.raises(TypeError, match=r"^attention_qkv: qkv must be a torch.Tensor, got NoneType$"):
        attention_qkv(None)


@pytest.mark.interpreter
def test_other_head_sizes(backend, device, monkeypatch):
    if backend == "torch":
        pytest.skip("PyTorch takes any head size")
    qkv = torch.randn(1, 4, 3, 1, 24, device=device)
    message = "attention: backend 'triton' cannot run: it takes head sizes 16, 32, 64, 128, got 24"
    with pytest.raises(RuntimeError, match=message):
        attention_qkv(qkv, 1.0, backend)
    monkeypatch.setenv("TARFLOW_FAST_BACKEND", "triton")
    with pytest.raises(RuntimeError, match=message):
        attention_qkv(qkv)
    with pytest.raises(RuntimeError, match="its dots are of float32 or less"):
        attention_qkv(torch.randn(1, 4, 3, 1, 16, device=device, dtype=torch.float64))
