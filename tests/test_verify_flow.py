"""verify_flow: its figures agree with direct computations, it takes flows of every kind, and it refuses bad input."""

import math

import pytest
import torch
from flows import random_flow, random_images, twin
from reports import by_block, section

from tarflow_fast import ReferenceTarFlow, TokenFlow, native
from tarflow_fast.flows import open_flow
from tarflow_fast.verify import verify_flow
from tarflow_fast.verify.jacobian import against_autograd
from tarflow_fast.verify.stages import forward_stages

SECTIONS = ["round trip", "log-determinant", "amplification by block", "jacobian by block"]


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)


def constant_flow(T=5, D=3, K=2, dtype=torch.float64, seed=3):
    """A flow over tokens whose nets ignore the tokens, so that log-scales and shifts are the biases of proj_out."""
    flow, draws = TokenFlow(T, D, 64, K, 1), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for block in flow.blocks:
            block.proj_out.bias.copy_(torch.randn(2 * D, generator=draws))
    return flow.to(dtype).eval()


# ---- figures against direct computations -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    """The shipped flow, the labels, and the report of the flow."""
    flow, _ = open_flow("digits")
    y = torch.arange(64) % 10
    return flow, y, verify_flow(flow, y=y, n=64)


def test_the_shipped_flow_passes(digits):
    _, _, report = digits
    assert report.ok and not report.failed
    assert [*dict.fromkeys(row["section"] for row in report.rows)] == SECTIONS
    assert report.table().endswith("\nall within their limits")


def test_round_trips_are_those_of_the_flow_itself(digits):
    flow, y, report = digits
    x = flow.sample(64, y, seed=0)
    with torch.no_grad():
        there = flow.inverse(flow(x, y)[0], y)[0] - flow.patchify(x)
        noise = torch.randn(64, *flow.var.shape, generator=torch.Generator().manual_seed(0)) * flow.var.sqrt()
        back = flow(flow.unpatchify(flow.inverse(noise, y)[0]), y)[0] - noise
    for row, apart in zip(section(report, "round trip"), (there, back), strict=True):
        error = apart.abs().amax(dim=(1, 2)).double().sort().values
        assert row["rows"] == 64 and row["median"] == error[31] and row["p999"] == row["largest"] == error[63]
        assert row["over_1e-3"] == row["over_1e-2"] == 0


def test_shares_and_quantiles_of_a_coarse_flow():
    flow = random_flow(scale=0.05, num_blocks=3).bfloat16()
    report = verify_flow(flow, n=1100, jacobian_rows=0)
    z = torch.randn(1100, *flow.var.shape, generator=torch.Generator().manual_seed(0)).bfloat16() * flow.var.sqrt()
    with torch.no_grad():
        error = (flow(flow.unpatchify(flow.inverse(z)[0]))[0].double() - z.double()).abs().amax(dim=(1, 2))
    row = section(report, "round trip")[1]
    assert 0 < (error > 1e-2).double().mean() < 1
    assert row["over_1e-3"] == (error > 1e-3).double().mean() and row["over_1e-2"] == (error > 1e-2).double().mean()
    ranked = error.sort().values
    assert row["p999"] == ranked[1098] and row["largest"] == ranked[1099] and row["median"] == ranked[549]


def test_log_determinants_add_up_as_the_flows_do():
    flow = random_flow(scale=0.05, dtype=torch.float64)
    images = random_images(flow)
    report = verify_flow(flow, images)
    with torch.no_grad():
        z, _, means = flow(images)
        off = (means * 64 + flow.inverse(z)[1]).abs()
    row = section(report, "log-determinant")[0]
    assert (
        row["largest"] == pytest.approx(off.max().item(), abs=1e-14) and row["largest_per_dim"] == row["largest"] / 64
    )
    assert row["ok"] and row["largest"] < 1e-13


def test_largest_log_scales_are_those_of_the_reference(digits):
    flow, y, report = digits
    reference, met = twin(flow), {}
    for number, block in enumerate(reference.blocks):
        block.proj_out.register_forward_hook(
            lambda _module, _inputs, out, number=number: met.update({number: out.chunk(2, dim=-1)[0][:, :-1]})
        )
    reference(flow.sample(64, y, seed=0).double(), y)
    expected = [met[number].abs().max().item() for number in range(4)]
    assert by_block(report, "largest_a") == pytest.approx(expected, rel=1e-5)


def test_stretches_of_constant_nets_in_closed_form():
    flow = constant_flow()
    report = verify_flow(flow, n=3)
    for sign, key in ((1, "inverse_stretch"), (-1, "forward_stretch")):
        expected = []
        for block in flow.blocks:
            scale = (2 * sign * block.proj_out.bias[:3]).exp()  # squared; the first of 5 tokens is not scaled
            expected.append((((3 + 4 * scale.sum()) / 15) ** 0.5).item())
        assert by_block(report, key) == pytest.approx(expected, rel=1e-6)
    assert by_block(report, "largest_a") == [block.proj_out.bias[:3].abs().max().item() for block in flow.blocks]


def test_reach_of_one_constant_net_in_closed_form():
    flow = constant_flow(T=40, K=1)
    report = verify_flow(flow, n=1)
    a, b = flow.blocks[0].proj_out.bias.detach().chunk(2)
    z = torch.randn(1, 40, 3, generator=torch.Generator().manual_seed(0)).double()
    x = torch.cat([z[:, :1], z[:, 1:] * a.exp() + b], dim=1)
    # The two changes of an element add up if both have the same sign, as for some of 40 tokens. The first token is not
    # scaled.
    most_x, most_z = x.abs().max().item(), z.abs().max().item()
    up, down = max(1.0, a.max().exp().item()), max(1.0, (-a).max().exp().item())
    assert report.facts["reach_x"] == pytest.approx(most_z * up + most_x, rel=1e-6)
    assert report.facts["reach_z"] == pytest.approx(most_x * down + most_z, rel=1e-6)
    assert report.facts["reach_log_det"] == 0
    (row, _) = section(report, "round trip")
    assert row["limit"] == pytest.approx(8 * 2 * 2**-53 * report.facts["reach_x"], rel=1e-12)


@pytest.mark.parametrize("num_classes", [0, 3])
def test_jacobian_is_that_of_the_reference(num_classes):
    flow = random_flow(scale=0.05, dtype=torch.float64, num_classes=num_classes)
    y = torch.tensor([2, -1]) if num_classes else None
    images, reference = random_images(flow), twin(flow)
    with torch.no_grad():
        stages = forward_stages(flow, flow.patchify(images), y)
    found = against_autograd(flow, stages, y, 2)
    got = torch.stack(stages.log_dets, dim=1) - found.off
    for row in range(2):
        label = None if y is None else y[row : row + 1]
        matrix = torch.autograd.functional.jacobian(
            lambda tokens, label=label: reference(reference.unpatchify(tokens), label)[0],
            reference.patchify(images[row : row + 1]),
        )
        expected = torch.linalg.slogdet(matrix.view(64, 64)).logabsdet
        assert got[row].sum().item() == pytest.approx(expected.item(), abs=1e-11)
    assert (found.above == 0).all() and (found.off.abs() <= found.rounding).all()


def test_rows_do_not_depend_on_the_batch():
    flow = random_flow(scale=0.05)
    images = random_images(flow, B=9)
    one, other = verify_flow(flow, images), verify_flow(flow, images, batch_size=4)
    for name in ("round trip", "log-determinant"):
        for a, b in zip(section(one, name), section(other, name), strict=True):
            assert {k: v for k, v in a.items() if k != "limit"} == {k: v for k, v in b.items() if k != "limit"}
    assert by_block(one, "log_det_off") == by_block(other, "log_det_off")


# ---- flows of every kind ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_limits_follow_the_dtype(dtype):
    flow = random_flow(scale=0.05, dtype=dtype)
    report = verify_flow(flow, random_images(flow, B=20))
    u = torch.finfo(dtype).eps / 2
    facts, (row, _) = report.facts, section(report, "round trip")
    assert report.ok, report.table()
    assert facts["roundings"] == 8 and facts["roundoff_forward"] == facts["roundoff_inverse"] == u
    largest = random_images(flow, B=20).abs().max().item()
    assert row["limit"] == pytest.approx(min(16 * u * facts["reach_x"], math.sqrt(2 * u) * largest), rel=1e-12)
    assert row["largest"] > u / 8  # there was an error to measure


@pytest.mark.skipif(not native.available(), reason=native.reason() or "native")
@pytest.mark.parametrize("precision, roundoff", [("fp32", 2**-24), ("bf16", 2**-8), ("int8", 2**-6)])
def test_limits_follow_the_precision(precision, roundoff):
    flow = random_flow(scale=0.05)
    report = verify_flow(flow, n=20, precision=precision)
    assert report.ok, report.table()
    assert report.facts["precision"] == precision and report.facts["roundoff_inverse"] == roundoff
    assert report.facts["roundoff_forward"] == 2**-24
    assert section(report, "round trip")[0]["largest"] > roundoff / 100


def test_autocast_is_taken_for_the_precision():
    flow = random_flow(scale=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        report = verify_flow(flow, n=8)
    assert report.ok and report.facts["precision"] == "bf16" and report.facts["roundoff_forward"] == 2**-8
    assert by_block(report, "above_diagonal") == [0, 0]


def test_a_flow_without_log_scales(capsys):
    report = verify_flow(random_flow(nvp=False, scale=0.3), n=8)
    assert report.ok, report.table()
    assert by_block(report, "largest_a") == [None, None] and "| block 0 | -   " in report.table()
    assert [row["largest"] for row in section(report, "log-determinant")[:2]] == [0, 0]


@pytest.mark.parametrize("T, D", [(1, 3), (6, 1), (5, 7)])
def test_orders_and_ragged_sizes(T, D):
    orders = torch.stack([torch.randperm(T) for _ in range(3)])
    flow = TokenFlow(T, D, 32, 3, 1, head_size=16, orders=orders).eval()
    torch.nn.init.normal_(flow.blocks[1].proj_out.weight, std=0.05)
    report = verify_flow(flow, torch.randn(5, T, D))
    assert report.ok, report.table()
    assert by_block(report, "above_diagonal") == [0, 0, 0]


def test_no_jacobian_of_large_flows_or_when_not_wanted():
    report = verify_flow(random_flow(scale=0.05, img_size=(32, 18)), n=2)
    assert report.ok and not section(report, "jacobian by block") and len(section(report, "log-determinant")) == 2
    assert "Nothing was compared with autograd: T D = 576 is more than 512." in report.table()
    report = verify_flow(random_flow(scale=0.05), n=2, jacobian_rows=0)
    assert "Nothing was compared with autograd: jacobian_rows is 0." in report.table()


def test_nothing_of_the_flow_is_changed():
    flow = random_flow(scale=0.05).train()
    state, random = {key: value.clone() for key, value in flow.state_dict().items()}, torch.get_rng_state()
    with torch.inference_mode():
        assert verify_flow(flow, n=4).ok
    assert flow.training and all(parameter.requires_grad for parameter in flow.parameters())
    assert all(torch.equal(value, state[key]) for key, value in flow.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.skipif(not native.available(), reason=native.reason() or "native")
def test_a_frozen_flow_stays_frozen():
    flow = random_flow(scale=0.05).freeze()
    assert verify_flow(flow, n=4).ok and flow.frozen
    flow.sample(2)


# ---- bad input -------------------------------------------------------------------------------------------------------

IMAGES = torch.zeros(2, 1, 8, 8)


@pytest.mark.parametrize(
    "error, arguments, message",
    [
        (ValueError, {"x": IMAGES[0]}, r"x must have shape \(B, 1, 8, 8\), got \(1, 8, 8\)"),
        (TypeError, {"x": IMAGES.double()}, "x must have the model's dtype torch.float32, got torch.float64"),
        (TypeError, {"x": "digits"}, "x must be a torch.Tensor, got str"),
        (ValueError, {"x": IMAGES[:0]}, "x must hold at least one row, got 0"),
        (ValueError, {"x": IMAGES / 0}, "x must be finite, got 2 rows that are not, first row 0"),
        (ValueError, {"x": IMAGES, "n": 3}, "n must be left out where x is given, or be its 2 rows, got 3"),
        (ValueError, {"n": 0}, "n must be >= 1, got 0"),
        (TypeError, {"n": 2.0}, "n must be an int, got float"),
        (ValueError, {"x": IMAGES, "y": torch.tensor([0])}, r"y must have shape \(2,\), one label a row, got \(1,\)"),
        (ValueError, {"n": 2, "y": 3}, r"y must be below num_classes = 3 \(negative: no label\), got 3"),
        (ValueError, {"seed": -1}, "seed must be >= 0, got -1"),
        (ValueError, {"precision": "fp8"}, "precision must be None or one of fp32, bf16, int8, got 'fp8'"),
        (ValueError, {"directions": 0}, "directions must be >= 1, got 0"),
        (ValueError, {"jacobian_rows": -1}, "jacobian_rows must be >= 0, got -1"),
        (ValueError, {"batch_size": 0}, "batch_size must be >= 1, got 0"),
    ],
)
def test_bad_input(error, arguments, message):
    with pytest.raises(error, match=f"^verify_flow: {message}$"):
        verify_flow(random_flow(num_classes=3), **arguments)


def test_a_model_of_another_kind_is_refused():
    reference = ReferenceTarFlow(1, 8, 2, 64, 1, 1)
    with pytest.raises(TypeError, match="flow must be a TokenFlow or a TarFlow, got ReferenceTarFlow"):
        verify_flow(reference)


def test_precision_without_an_engine_raises():
    with pytest.raises(RuntimeError, match="precision 'int8' needs an engine that computes in it"):
        verify_flow(random_flow(dtype=torch.float64), n=2, precision="int8")
