"""TokenFlow: laws, values, density, samples and gradients on tokens in any order, with every engine."""

import subprocess
import sys

import pytest
import torch
from compare import assert_accurate, same_bits
from flows import random_flow, random_noise
from tokens import draw_rows, random_tokens_flow

from tarflow_fast import TokenFlow, native

T, D, K = 9, 4, 3
GENERATOR = torch.Generator().manual_seed(3)
ORDERS = [torch.randperm(T, generator=GENERATOR).tolist() for _ in range(K)]
SIZES = dict(num_tokens=T, token_size=D, num_blocks=K, layers_per_block=2, channels=64)
GUIDED = {"guidance": 1.5, "attn_temp": 0.8, "annealed_guidance": True}
BACKENDS = ["torch", *(["cpu"] if native.available() else [])]
needs_native = pytest.mark.skipif(not native.available(), reason=native.reason() or "native")


def flow_in_orders(dtype=torch.float32, **config):
    return random_tokens_flow(dtype=dtype, scale=0.1, orders=ORDERS, **SIZES | config)


def straight(flow):
    """The function x -> (z, log_det) of the same flow. It gathers tokens around blocks that have no order."""

    def encode(x, y=None):
        total = 0.0
        for block, order in zip(flow.blocks, ORDERS, strict=True):
            plain = TokenFlow(**SIZES | {"num_blocks": 1, "num_classes": flow.num_classes, "nvp": flow.nvp}).to(x.dtype)
            state = dict(block.state_dict())
            state["pos_embed"] = state["pos_embed"][order]
            plain.blocks[0].load_state_dict(state)
            z, log_det = plain(x[:, order], y)
            x = torch.empty_like(x)
            x[:, order] = z
            total = total + log_det
        return x, total

    return encode


@pytest.mark.parametrize("nvp", [True, False])
def test_a_block_in_an_order_is_a_block_of_gathered_tokens(nvp):
    flow, x = flow_in_orders(torch.float64, nvp=nvp, num_classes=3), draw_rows(5, T, D, dtype=torch.float64)
    y = torch.tensor([0, 2, -1, 1, 0])
    with torch.no_grad():
        for got, expected in zip(flow(x, y), straight(flow)(x, y), strict=True):
            torch.testing.assert_close(got, torch.as_tensor(expected).expand_as(got), rtol=1e-12, atol=1e-12)


def test_the_jacobian_in_float64():
    """The determinant of the Jacobian gives log_det in both directions.

    The Jacobian of each block is triangular in the order that the block sees.
    """
    flow, x = flow_in_orders(torch.float64), draw_rows(1, T, D, dtype=torch.float64)
    with torch.no_grad():
        z, log_det = flow(x)
        back, its_log_det = flow.inverse(z)
    torch.testing.assert_close(back, x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(its_log_det, -log_det, rtol=1e-9, atol=1e-9)
    jacobian = torch.autograd.functional.jacobian(lambda row: flow(row)[0], x).view(T * D, T * D)
    torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], log_det[0], rtol=1e-9, atol=1e-9)
    for block, order in zip(flow.blocks, ORDERS, strict=True):
        of_block = torch.autograd.functional.jacobian(lambda row, block=block: block(row)[0], x)[0, :, :, 0]
        seen = of_block[order][:, :, order].abs().amax(dim=(1, 3))  # (T, T), in the net's order
        assert seen.triu(1).max() == 0 and seen[torch.ones(T, T).tril().bool()].min() > 0


@pytest.mark.parametrize("arguments", [{}, GUIDED], ids=["plain", "guided"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_inverse_in_any_order(backend, arguments):
    flow, z = flow_in_orders(num_classes=3), draw_rows(32, T, D)
    y, exact = torch.arange(32) % 4 - 1, flow_in_orders(torch.float64, num_classes=3)
    flow.backend = "torch"
    plain, (x, log_det) = flow.inverse(z, y, **arguments), exact.inverse(z.double(), y, **arguments)
    flow.backend = backend
    got = flow.inverse(z, y, **arguments)
    assert_accurate("x", got[0], x, plain[0])
    assert_accurate("log_det", got[1], log_det, plain[1])
    assert not torch.allclose(got[0], random_tokens_flow(scale=0.1, num_classes=3, **SIZES).inverse(z, y)[0])


@needs_native
@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_other_precisions_and_freeze_in_any_order(precision):
    flow, z = flow_in_orders(), draw_rows(8, T, D)
    x, log_det = flow.inverse(z, precision=precision)
    exact, its_log_det = flow.inverse(z)
    assert (x - exact).abs().max() < 0.2 and (log_det - its_log_det).abs().max() < 0.5
    frozen = flow.freeze().inverse(z, precision=precision)
    assert same_bits(frozen[0], x) and same_bits(frozen[1], log_det)


def test_orders_may_be_a_tensor_and_the_default_is_identity_and_flip():
    given = TokenFlow(**SIZES, orders=torch.tensor(ORDERS))
    assert [block.order.places for block in given.blocks] == ORDERS and given.config["orders"] == ORDERS
    default = TokenFlow(**SIZES)
    named = [list(range(T)), list(range(T))[::-1], list(range(T))]
    assert [block.order.places for block in default.blocks] == named and default.config["orders"] is None
    assert [block.flip for block in default.blocks] == [False, True, False]


def test_a_flow_over_tokens_is_its_tarflow():
    """A TarFlow with the same weights gives the same bits, except that the log-dets of its forward pass are means."""
    images = random_flow(channels=64, num_classes=0)
    T, D = images.var.shape
    sizes = dict(channels=64, num_blocks=len(images.blocks), layers_per_block=images.layers_per_block)
    tokens = TokenFlow(T, D, **sizes, nvp=images.nvp)
    tokens.load_state_dict(images.state_dict())
    noise = random_noise(images, 3)
    pictures, log_det = images.reverse(noise, return_log_det=True)
    x, its_log_det = tokens.inverse(noise * images.var.sqrt())
    assert same_bits(images.patchify(pictures), x)
    torch.testing.assert_close(log_det, its_log_det + 0.5 * images.var.log().sum(), rtol=1e-6, atol=1e-5)
    with torch.no_grad():
        assert same_bits(images(pictures)[0], tokens(x)[0])
        torch.testing.assert_close(images(pictures)[2] * T * D, tokens(x)[1], rtol=1e-6, atol=1e-5)


# ---- density without gradients -------------------------------------------------------------------------------------


def density(flow, x, y=None, **options):
    with torch.no_grad():
        return flow.log_prob(x, y, **options)


def by_modules(flow, x, y=None):
    """log_prob as the net's modules compute it. They do because gradients are kept."""
    return flow.log_prob(x, y).detach()


@needs_native
@pytest.mark.every_isa
@pytest.mark.parametrize("orders", [None, ORDERS], ids=["in turn", "any"])
def test_density_by_the_engine(orders):
    flow = random_tokens_flow(scale=0.1, num_classes=3, orders=orders, **SIZES)
    x, y = draw_rows(64, T, D), torch.arange(64) % 4 - 1
    exact = by_modules(double(flow), x.double(), y)
    assert_accurate("fp32", density(flow, x, y, precision="fp32"), exact, by_modules(flow, x, y))
    with torch.autocast("cpu", torch.bfloat16):
        half = by_modules(flow, x, y)
    assert_accurate("bf16", density(flow, x, y, precision="bf16"), exact, half)


def double(flow):
    twin = TokenFlow(**flow.config).double()
    twin.load_state_dict(flow.state_dict())
    return twin


@needs_native
def test_density_depends_on_nothing_but_its_row(monkeypatch, threads):
    """It does not depend on the cut into passes, the number of threads, other rows, or weights packed before."""
    from tarflow_fast.engines import cpu

    flow, x = flow_in_orders(), draw_rows(37, T, D)
    expected = density(flow, x, precision="fp32")
    for rows, least in ((1, 1), (5, 1), (64, 32)):
        monkeypatch.setattr(cpu, "PASS_ROWS", rows)
        monkeypatch.setattr(cpu, "MIN_PASS_ROWS", least)
        assert same_bits(density(flow, x, precision="fp32"), expected)
    threads(1)
    assert same_bits(density(flow, x, precision="fp32"), expected)
    assert same_bits(density(flow, x[30:33], precision="fp32"), expected[30:33])
    flow.freeze()
    assert same_bits(density(flow, x, precision="fp32"), expected)


@needs_native
def test_density_within_a_memory_limit():
    flow, x = flow_in_orders(), draw_rows(64, T, D)
    expected = density(flow, x, precision="fp32")
    assert same_bits(density(flow, x, precision="fp32", memory_limit=2 * 10**6), expected)
    with pytest.raises(
        MemoryError, match=r"^block_inverse: one row needs [\d,]+ bytes \(plans .* over the limit of 1,000$"
    ):
        density(flow, x, precision="fp32", memory_limit=1000)


@needs_native
def test_density_steps_aside_where_modules_must_run(fresh_warnings):
    flow, x = flow_in_orders(), draw_rows(4, T, D)
    exact = double(flow)
    for hooked in (flow, exact):
        hooked.blocks[1].proj_out.register_forward_hook(lambda module, inputs, output: 0 * output)
    assert_accurate("fp32", density(flow, x), by_modules(exact, x.double()), by_modules(flow, x))
    with pytest.raises(
        RuntimeError, match=r"precision 'int8' needs an engine that computes in it: proj_out has hooks$"
    ):
        density(flow, x, precision="int8")
    with pytest.raises(ValueError, match=r"^log_prob: precision must be None where gradients are kept"):
        flow.log_prob(x, precision="bf16")


# ---- gradients through the inverse ---------------------------------------------------------------------------------


def test_a_differentiable_inverse_has_the_gradients_of_its_blocks():
    """The backward pass inverts blocks again, and the gradient is that of the plain composition."""
    flow, z = flow_in_orders(torch.float64), draw_rows(2, T, D, dtype=torch.float64)

    def loss(x, log_det):
        return (x.sin().sum() - log_det.sum()), (*flow.parameters(),)

    ticks = []
    value, parameters = loss(*flow.inverse(z, differentiable=True))
    got = torch.autograd.grad(value, parameters)
    tokens, total = z, 0.0
    for block in reversed(flow.blocks):
        from tarflow_fast.engines.call import Call

        tokens, log_det = block.invert(tokens, call=Call(differentiable=True), on_token=lambda: ticks.append(1))
        total = total + log_det
    value, parameters = loss(tokens, total)
    for ours, theirs in zip(got, torch.autograd.grad(value, parameters), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
    assert len(ticks) == K * (T - 1) and max(each.abs().max() for each in got) > 0.1


PEAK = """
import resource, torch
from tarflow_fast import TokenFlow
torch.set_num_threads(1)
flow = TokenFlow(48, 3, 64, {blocks}, 2)
x, log_det = flow.inverse(torch.randn(64, 48, 3), differentiable=True)
(x.square().sum() - log_det.sum()).backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def test_a_differentiable_inverse_keeps_the_graph_of_one_block():
    """Six blocks take little more memory than two, while the graph of each block alone takes hundreds of MiB."""
    two, six = (
        int(subprocess.run([sys.executable, "-c", PEAK.format(blocks=k)], capture_output=True, text=True).stdout)
        for k in (2, 6)
    )
    grown = 64 * (48 * 49 // 2) * 2 * 2 * 64 * 4 >> 20  # keys and values of two layers, copied for every token
    assert grown > 70 and six - two < grown, (
        f"2 blocks take {two} MiB, 6 blocks take {six} MiB, and the caches of one graph take {grown} MiB"
    )
