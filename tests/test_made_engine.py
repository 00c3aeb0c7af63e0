"""The sweep in C++ by itself: activations and univariate inverses number by number, and bits that depend on nothing."""

import signal
import threading
import time

import pytest
import torch
from compare import assert_accurate, same_bits

zuko = pytest.importorskip("zuko")

from tarflow_fast import made, native  # noqa: E402
from tarflow_fast.made.engine import Plan  # noqa: E402
from tarflow_fast.made.net import ACTIVATIONS, Activation, Layer, Made, OfContext, Univariate  # noqa: E402
from tarflow_fast.made.schedule import Schedule, masks_of  # noqa: E402

pytestmark = pytest.mark.skipif(not native.available(), reason=native.reason())


def engine(layers, univariate, y, context):
    """The engine's inverse of one feature, through a net that sees nothing but the context (B, E)."""
    transform = Made(1, layers, univariate, (), context.size(1))
    schedule = Schedule.of(transform, masks_of(layers, 1))
    return Plan(transform, schedule, y.dtype).invert(transform, y[:, None], context)


def itself(units, dtype):
    """The context as it is."""
    return OfContext(lambda: torch.eye(units, dtype=dtype), lambda: None)


def blind(units, inputs, weight=None, **options):
    """A layer of which no unit sees x."""
    weight = torch.zeros(units, inputs) if weight is None else weight
    seen = torch.zeros(units, inputs) if options.get("source", 0) == 0 else torch.ones(units, inputs)
    return Layer(lambda: weight, lambda: seen, lambda: None, **options)


@pytest.mark.every_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name, dtype):
    """A net of one hidden unit, whose output is the shift: x = 0 - shift."""
    activation = Activation(name, 0.3)
    v = torch.cat([torch.linspace(-30, 30, 20001), torch.linspace(-2, 2, 20001), torch.logspace(-30, 2, 999).neg()])
    v = torch.cat([v, torch.tensor([0.0, -0.0, 88.0, -88.0, 104.0, -104.0, 1e4, -1e4, 1e38, -1e38])]).to(dtype)
    layers = (
        blind(1, 1, weight=torch.zeros(1, 1, dtype=dtype), term=itself(1, dtype)),
        blind(2, 1, weight=torch.tensor([[-1.0], [0.0]], dtype=dtype), source=1, activation=activation),
    )
    affine = Univariate(2, None, ("affine_zuko", (-7.0,)))
    got, _ = engine(layers, affine, torch.zeros_like(v), v[:, None])
    if dtype is torch.float64:  # judged by PyTorch's own rounding: 4 ulp, and of the argument where the result is tiny
        expected = activation(v)
        error = (got[:, 0] - expected).abs()
        assert (error <= 4 * torch.finfo(dtype).eps * (expected.abs() + 1e-30)).all() or name == "gelu", error.max()
        assert (error <= 1e-14 * (1 + v.abs())).all()
    else:
        assert_accurate(name, got[:, 0], activation(v.double()), activation(v))


def parameters_and_noise(count, scale=3.0, rows=4001):
    phi = torch.randn(rows, count, generator=torch.Generator().manual_seed(count)) * scale
    y = torch.randn(rows, generator=torch.Generator().manual_seed(1)) * 4
    y[:20] = torch.linspace(-7, 7, 20)
    y[20:24] = torch.tensor([5.0, -5.0, 0.0, 1e30])
    return phi, y


def check_univariate(univariate, phi, y):
    """Against the library's own, float64 the judge."""
    P = phi.size(1)
    layers = (blind(P, 1, term=itself(P, torch.float32)),)
    truth = univariate.inverse(y.double()[:, None], phi.double()[:, None])
    plain = univariate.inverse(y[:, None], phi[:, None])
    got = engine(layers, univariate, y, phi)
    assert_accurate("x", got[0], truth[0], plain[0])
    assert_accurate("log_det", got[1], truth[1][:, 0], plain[1][:, 0])
    double = (blind(P, 1, weight=torch.zeros(P, 1, dtype=torch.float64), term=itself(P, torch.float64)),)
    got = engine(double, univariate, y.double(), phi.double())
    torch.testing.assert_close(got[0], truth[0], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(got[1], truth[1][:, 0], rtol=1e-10, atol=1e-10)


@pytest.mark.every_isa
def test_affine_of_zuko():
    transform = zuko.flows.MaskedAutoregressiveTransform(2)
    check_univariate(made.zuko.read(transform).univariate, *parameters_and_noise(2, 10.0))


@pytest.mark.every_isa
@pytest.mark.parametrize("bins", [1, 2, 8, 64])
def test_spline_of_zuko(bins):
    transform = zuko.flows.NSF(2, bins=bins, transforms=1).transform.transforms[0]
    check_univariate(made.zuko.read(transform).univariate, *parameters_and_noise(3 * bins - 1, 1.0))


def flows():
    """Flows with hidden units of every step, none, and several; a residual one; a context for each row."""
    torch.manual_seed(0)
    options = dict(transforms=2, randperm=True)
    yield zuko.flows.MAF(23, hidden_features=(40, 70), **options), None
    yield zuko.flows.NSF(9, context=2, hidden_features=(64, 64), residual=True, **options), torch.randn(300, 2)


@pytest.mark.every_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_bits_depend_on_the_row_alone(dtype):
    """Neither on the batch, which decides how wide tiles are, nor on the place in it, threads, or the run."""
    for flow, context in flows():
        made.accelerate(flow.to(dtype), path="cpu")
        D = 23 if context is None else 9
        z = torch.randn(300, D, dtype=dtype)
        context = None if context is None else context.to(dtype)
        with torch.no_grad():

            def run(rows, flow=flow, z=z, context=context):
                own = flow(None if context is None else context[rows])
                return own.transform.inv.call_and_ladj(z[rows])

            whole = run(slice(None))
            for rows in ([17], [3, 5], range(20, 60), range(299, -1, -1), range(150)):
                for part, all_rows in zip(run([*rows]), whole, strict=True):
                    assert same_bits(part, all_rows[[*rows]])
            before = torch.get_num_threads()
            try:
                for threads in (1, 2, 3):
                    torch.set_num_threads(threads)
                    assert all(map(same_bits, run(slice(None)), whole))
            finally:
                torch.set_num_threads(before)


@pytest.mark.every_isa
def test_what_is_not_finite_stays_in_its_row():
    for flow, context in flows():
        made.accelerate(flow, path="cpu")
        z = torch.randn(300, 23 if context is None else 9)
        with torch.no_grad():
            transform = flow(context).transform
            right = transform.inv.call_and_ladj(z)
            spoiled = z.clone()
            spoiled[7, 1], spoiled[40, 0], spoiled[41] = torch.nan, torch.inf, -torch.inf
            got = transform.inv.call_and_ladj(spoiled)
        others = [row for row in range(300) if row not in (7, 40, 41)]
        assert all(same_bits(a[others], b[others]) for a, b in zip(got, right, strict=True))
        assert got[0][7].isnan().any()


def test_two_threads_sample_with_one_flow():
    (flow, _), _ = flows()
    made.accelerate(flow, path="cpu")
    noises = [torch.randn(100, 23, generator=torch.Generator().manual_seed(k)) for k in range(6)]

    def invert(z):
        with torch.no_grad():
            return flow().transform.inv(z)

    expected, results = [invert(z) for z in noises], [None] * 6

    def work(numbers):
        for _ in range(5):
            for k in numbers:
                results[k] = invert(noises[k])

    threads = [threading.Thread(target=work, args=(range(start, 6, 2),)) for start in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(map(same_bits, results, expected))


def test_frozen_weights_are_kept_and_a_change_is_found():
    (flow, _), _ = flows()
    made.freeze(made.accelerate(flow, path="cpu"))
    z = torch.randn(50, 23)
    with torch.no_grad():
        before = flow().transform.inv(z)
        assert same_bits(flow().transform.inv(z), before)
        flow.transform.transforms[0].hyper[0].weight.mul_(1.5)
        with pytest.raises(RuntimeError, match=r"changed after freeze\(\)"):
            flow().transform.inv(z)
        made.freeze(flow)
        assert not torch.equal(flow().transform.inv(z), before)
        made.unfreeze(flow)
        flow.transform.transforms[0].hyper[0].weight.mul_(1.5)
        flow().transform.inv(z)


def test_ctrl_c_is_heard_soon():
    """A call of the engine lasts 0.1 s or so, whatever the batch: the whole inverse takes seconds."""
    flow = made.accelerate(zuko.flows.MAF(64, transforms=5, hidden_features=(256, 256)), path="cpu")
    z, began = torch.randn(300_000, 64), time.perf_counter()
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with torch.no_grad(), pytest.raises(KeyboardInterrupt):
            flow().transform.inv(z)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    heard = time.perf_counter() - began - 0.2
    began = time.perf_counter()
    with torch.no_grad():
        flow().transform.inv(z[:30_000])
    whole = (time.perf_counter() - began) * 10
    assert heard < max(0.3, whole / 4), (heard, whole)
