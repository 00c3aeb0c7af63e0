"""layer_norm, bias_gelu, bias_residual: values, gradients, bits and errors of every backend that can run here."""

import math
import os

import pytest
import torch
from cases import ROWS_CASES, ROWS_DTYPES, RowsCase, rows_inputs
from compare import Judged, same_bits

from tarflow_fast.ops import bias_gelu, bias_residual, layer_norm
from tarflow_fast.ops.registry import OPS as REGISTRY

BACKENDS = ["triton"] if os.environ.get("TRITON_INTERPRET") == "1" else ["torch", "triton"]
IDS = ["-".join(str(dtype).removeprefix("torch.") for dtype in dtypes) for dtypes in ROWS_DTYPES]

# {name: (the op as a function of (x, weight, bias, residual, backend, dtype), the tensors it uses)}
OPS = {
    "layer_norm": (lambda x, w, b, _, backend, dtype=None: layer_norm(x, w, b, 1e-5, dtype, backend), "x w b"),
    "bias_gelu": (lambda x, _w, b, _r, backend, dtype=None: bias_gelu(x, b, backend), "x b"),
    "bias_residual": (lambda x, _, b, r, backend, dtype=None: bias_residual(x, b, r, backend), "x b r"),
}


@pytest.fixture(params=BACKENDS)
def backend(request, device):
    if why_not := REGISTRY["layer_norm"].why_not(request.param, device, torch.float32):
        pytest.skip(why_not)
    return request.param


@pytest.fixture(params=OPS)
def name(request):
    return request.param


def everything(name, backend, inputs, dtype=None, needs="x w b r"):
    """{"out": ..., "dx": ..., ...} holds the result, and the gradients of those inputs that `needs` names."""
    op, takes = OPS[name]
    *tensors, dout = inputs
    leaves = dict(zip("xwbr", (t.detach() for t in tensors), strict=True))
    wanted = [key for key in takes.split() if key in needs]
    for key in wanted:
        leaves[key].requires_grad_()
    out = op(*leaves.values(), backend, dtype)
    gradients = torch.autograd.grad(out, [leaves[key] for key in wanted], dout.to(out.dtype)) if wanted else ()
    return {"out": out.detach()} | {"d" + key: g for key, g in zip(wanted, gradients, strict=True)}


@pytest.mark.interpreter
@pytest.mark.parametrize("dtypes", ROWS_DTYPES, ids=IDS)
@pytest.mark.parametrize("case", ROWS_CASES, ids=str)
def test_values_and_gradients(case, dtypes, name, backend, device):
    if why_not := REGISTRY[name].why_not(backend, device, dtypes[0]):
        pytest.skip(why_not)
    judged, least = Judged(), case.N if math.prod(case.shape) else 0  # a weight's gradient has N numbers
    for _ in range(1 if dtypes[0] == torch.float64 else judged.draws(least)):
        inputs = rows_inputs(case, dtypes, device)
        got, plain = (everything(name, each, inputs) for each in (backend, "torch"))
        assert got.keys() == plain.keys()
        truth = everything(name, "torch", [t.double().cpu() for t in inputs])
        for key, value in got.items():
            if dtypes[0] == torch.float64:  # there is no wider dtype to compare with
                torch.testing.assert_close(value, plain[key], rtol=1e-11, atol=1e-11)
            else:
                judged.add(key, value, truth[key], plain[key])
    judged.check()


@pytest.mark.interpreter
@pytest.mark.parametrize("stored", [torch.float16, torch.float32, torch.bfloat16], ids=str)
def test_layer_norm_into_another_dtype(stored, backend, device):
    if why_not := REGISTRY["layer_norm"].why_not(backend, device, stored):
        pytest.skip(why_not)
    inputs = rows_inputs(RowsCase((3, 4), 70), (torch.float32,) * 3, device)
    inputs = *inputs[:4], inputs[4].to(stored)
    got, plain = (everything("layer_norm", each, inputs, stored) for each in (backend, "torch"))
    truth = everything("layer_norm", "torch", [t.double() for t in inputs])
    assert got["out"].dtype == stored and got["dx"].dtype == torch.float32
    judged = Judged()
    for key, value in got.items():
        judged.add(key, value, truth[key].cpu(), plain[key])
    judged.check()


@pytest.mark.interpreter
@pytest.mark.parametrize("needs", ["x", "w", "b", "r", "x r", "w b"])
def test_only_the_gradients_asked_for(needs, name, backend, device, monkeypatch):
    if not set(needs.split()) & set(OPS[name][1].split()):
        pytest.skip(f"{name} does not take these")
    inputs = rows_inputs(RowsCase((2, 3), 33), ROWS_DTYPES[2 if name == "bias_residual" else 1], device)
    full = everything(name, backend, inputs)
    if backend == "triton" and "b" not in needs and "w" not in needs:
        from tarflow_fast.kernels.triton import columns

        monkeypatch.setattr(columns, "sum_kernel", None)  # with frozen weights nothing is summed over rows
    for key, value in everything(name, backend, inputs, needs=needs).items():
        assert same_bits(value, full[key]), key


@pytest.mark.interpreter
def test_non_contiguous(name, backend, device):
    if backend == "torch":
        pytest.skip("PyTorch's bits depend on strides")
    inputs = rows_inputs(RowsCase((3, 4), 19), ROWS_DTYPES[1], device)
    expected = everything(name, backend, inputs)
    rows = [t.transpose(0, 1).contiguous().transpose(0, 1) if t.ndim == 3 else t.repeat(2)[:19] for t in inputs]
    got = everything(name, backend, rows)
    assert got["out"].is_contiguous() and all(same_bits(got[key], expected[key]) for key in got)


@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter computes with numpy, which warns
def test_nan_and_infinity_stay_in_their_row(name, backend, device):
    inputs = rows_inputs(RowsCase((6,), 19), ROWS_DTYPES[1], device)
    clean = everything(name, backend, inputs)
    inputs[0][2, 4], inputs[0][4, 18] = torch.nan, torch.inf
    got = everything(name, backend, inputs)
    assert got["out"][2, 4].isnan() and not got["out"][4, 18].isfinite()
    for key in {"out", "dx", "dr"} & got.keys():
        assert same_bits(got[key][[0, 1, 3, 5]], clean[key][[0, 1, 3, 5]]), key
    if name != "layer_norm":
        assert same_bits(got["out"][2, :4], clean["out"][2, :4])


@pytest.mark.interpreter
def test_bits_do_not_depend_on_the_batch(name, backend, device):
    if backend == "torch":
        pytest.skip("PyTorch makes no such promise")
    inputs = rows_inputs(RowsCase((37,), 40), ROWS_DTYPES[1], device)
    together = everything(name, backend, inputs)
    again = everything(name, backend, inputs)
    assert all(same_bits(again[key], together[key]) for key in together)
    alone = everything(name, backend, [t[5:9] if t.ndim == 2 else t for t in inputs])
    assert all(same_bits(alone[key], together[key][5:9]) for key in {"out", "dx", "dr"} & together.keys())


# ---- torch ---------------------------------------------------------------------------------------------------------


@pytest.mark.interpreter
def test_gradcheck(name, backend, device):
    inputs = [t.requires_grad_() for t in rows_inputs(RowsCase((2,), 3), ROWS_DTYPES[0], device)[:4]]
    op, takes = OPS[name]
    free = [t for key, t in zip("xwbr", inputs, strict=True) if key in takes]

    def call(*free):
        given = dict(zip(takes.split(), free, strict=True))
        return op(*(given.get(key) for key in "xwbr"), backend)

    assert torch.autograd.gradcheck(call, free)
    if backend == "torch":
        assert torch.autograd.gradgradcheck(call, free)
        return
    (first,) = torch.autograd.grad(call(*free).square().sum(), inputs[2], create_graph=True)  # every op takes a bias
    with pytest.raises(RuntimeError, match=rf"^{name}: only backend 'torch' has a second derivative"):
        first.sum().backward()


@pytest.mark.interpreter
def test_opcheck(name, backend, device):
    if backend == "torch":
        pytest.skip("the plain form does not go through the op")
    x, w, b, r, dout = rows_inputs(RowsCase((2,), 5), ROWS_DTYPES[2], device)
    leaves = [t.requires_grad_() for t in (x, w, b, r)]
    ops, quick = torch.ops.tarflow_fast, ("test_schema", "test_autograd_registration", "test_faketensor")
    arguments = {
        "layer_norm": (*leaves[:3], 1e-5, torch.float32, backend),
        "bias_gelu": (leaves[0], leaves[2], backend),
        "bias_residual": (leaves[0], leaves[2], leaves[3], backend),
    }[name]
    torch.library.opcheck(getattr(ops, name).default, arguments)
    x, w, b = (t.detach() for t in (x, w, b))
    statistics = torch.zeros(2, device=device), torch.ones(2, device=device)
    for flag in (False, True):
        arguments = {
            "layer_norm": (dout, x, w, *statistics, flag, backend),
            "bias_gelu": (dout.half(), x, b, flag, backend),
            "bias_residual": (dout, torch.float16, torch.float32, True, flag, backend),
        }[name]
        torch.library.opcheck(getattr(ops, name + "_backward").default, arguments, test_utils=quick)


def test_auto_on_a_cpu_is_the_plain_form(name):
    inputs = rows_inputs(RowsCase((2, 3), 9), ROWS_DTYPES[4])
    auto, plain = (everything(name, backend, inputs) for backend in ("auto", "torch"))
    assert all(same_bits(auto[key], plain[key]) for key in plain)
    op = OPS[name][0]
    batched = torch.func.vmap(lambda x, r: op(x, *inputs[1:3], r, "auto"))(inputs[0], inputs[3])
    assert same_bits(batched, plain["out"])


# ---- errors --------------------------------------------------------------------------------------------------------

X, B = torch.zeros(2, 5), torch.zeros(5)
H = X.half()
ERRORS = [
    (layer_norm, (torch.zeros(()), B, B), ValueError, "x must have shape (..., N) with N >= 1, got ()"),
    (layer_norm, (X.long(), B, B), TypeError, "x must have a floating dtype, got torch.int64"),
    (layer_norm, (X, B[1:], B), ValueError, "weight must have shape (N,) = (5,), got (4,)"),
    (layer_norm, (X, B, None), TypeError, "bias must be a torch.Tensor, got NoneType"),
    (layer_norm, (X, B.half(), B), TypeError, "weight must have dtype torch.float32, got torch.float16"),
    (layer_norm, (H, B, B.half()), TypeError, "bias must have the dtype of weight, torch.float32, got torch.float16"),
    (layer_norm, (X, B, B, "0"), TypeError, "eps must be a number, got str"),
    (layer_norm, (X, B, B, -1.0), ValueError, "eps must be finite and >= 0, got -1.0"),
    (layer_norm, (X, B, B, 1e-5, torch.int8), TypeError, "dtype must be a floating dtype or None, got torch.int8"),
    (layer_norm, (X, B, B, 0.0, None, "cpu"), RuntimeError, "backend 'cpu' cannot run: layer_norm has no cpu kernel"),
    (bias_gelu, ([0.0], B), TypeError, "x must be a torch.Tensor, got list"),
    (bias_gelu, (X, X), ValueError, "bias must have shape (N,) = (5,), got (2, 5)"),
    (bias_gelu, (H, B.double()), TypeError, "bias must have dtype torch.float16 or torch.float32, got torch.float64"),
    (bias_gelu, (X, B.to("meta")), ValueError, "bias must be on the device of x, cpu, got meta"),
    (bias_gelu, (X, B, "gpu"), ValueError, "backend must be one of auto, torch, cpu, triton, cuda, got 'gpu'"),
    (bias_residual, (X, B, X[1:]), ValueError, "residual must have the shape of x, (2, 5), got (1, 5)"),
    (bias_residual, (X, B, X.half()), TypeError, "residual must have dtype torch.float32, got torch.float16"),
    (bias_residual, (X, B, X.to("meta")), ValueError, "residual must be on the device of x, cpu, got meta"),
]  # fmt: skip


@pytest.mark.parametrize(
    "op, arguments, kind, message", ERRORS, ids=[f"{o.__name__}-{m[-30:]}" for o, _, _, m in ERRORS]
)
def test_errors(op, arguments, kind, message):
    with pytest.raises(kind) as caught:
        op(*arguments)
    assert str(caught.value) == f"{op.__name__}: {message}"


@pytest.mark.interpreter
def test_rows_too_wide_for_a_kernel(backend, device):
    if backend == "torch":
        pytest.skip("PyTorch takes any")
    x = torch.zeros(1, 8193, device=device)
    message = "layer_norm: backend 'triton' cannot run: it takes rows of up to 8192 numbers, got 8193"
    with pytest.raises(RuntimeError, match=message):
        layer_norm(x, x[0], x[0], backend=backend)
