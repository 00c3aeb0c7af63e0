"""Flows with transforms other than the affine one: round trips, files, guidance, and what is refused."""

import json
import pickle

import pytest
import torch
from flows import random_flow
from tokens import draw_rows, random_tokens_flow

from tarflow_fast import LogisticMixture, Spline, TarFlow, TokenFlow

T, D = 5, 3
NAMES = ["logistic_mixture:3", "spline:4"]
every = pytest.mark.parametrize("name", NAMES)


def flow_of(name, dtype=torch.float64, scale=0.1, backend="torch", **config):
    flow = random_tokens_flow(dtype=dtype, scale=scale, **{"transform": name} | config)
    flow.backend = backend
    return flow


@every
@pytest.mark.parametrize("orders", [None, [[2, 0, 1, 4, 3], [0, 1, 2, 3, 4]]], ids=["flips", "orders"])
def test_round_trips_and_log_det(name, orders):
    flow, x = flow_of(name, orders=orders), draw_rows(4, T, D, dtype=torch.float64)
    z, log_det = flow(x)
    assert (z - x).abs().max() > 0.1
    back, shrunk = flow.inverse(z)
    assert (back - x).abs().max() < 1e-9 and (log_det + shrunk).abs().max() < 1e-9
    noise = torch.randn(4, T, D, dtype=torch.float64)
    drawn, shrunk = flow.inverse(noise)
    again, log_det = flow(drawn)
    assert (again - noise).abs().max() < 1e-9 and (log_det + shrunk).abs().max() < 1e-9
    jacobian = torch.autograd.functional.jacobian(lambda x: flow(x[None])[0].flatten(), x[0]).view(T * D, T * D)
    assert abs(torch.linalg.slogdet(jacobian).logabsdet - flow(x[:1])[1][0]) < 1e-9


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_samples_have_the_density_that_is_told(name, dtype):
    flow = flow_of(name, dtype)
    x, told = flow.sample_and_log_prob(64, seed=0)
    assert torch.equal(x, flow.sample(64, seed=0))
    assert (told - flow.log_prob(x)).abs().max() < (1e-3 if dtype == torch.float32 else 1e-9)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_windows_keep_their_promise(name, dtype):
    flow, z = flow_of(name, dtype, 0.03, num_tokens=9), draw_rows(3, 9, D, dtype=dtype)
    x, log_det = flow.inverse(z)
    same, same_log_det = flow.inverse(z, solver="windows", window=4, tolerance=0)
    near = 1e-4 if dtype == torch.float32 else 1e-11  # PyTorch's products of 1 and of 4 tokens round differently
    assert (same - x).abs().max() <= near and (same_log_det - log_det).abs().max() <= near
    close, _, report = flow.inverse(z, solver="windows", window=4, tolerance=1e-3, return_report=True)
    assert 0 < report.residual.max() <= 1e-3 and max(report.passes.values()) < 8
    assert (close - x).abs().max() < 0.1


@every
def test_differentiable_inverse(name):
    flow = flow_of(name, num_tokens=3, token_size=2, num_blocks=1, scale=0.5)
    z = torch.randn(1, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: flow.inverse(z, differentiable=True), z)
    x, _ = flow.inverse(z, differentiable=True)
    (z_bar,) = torch.autograd.grad(x.square().sum(), flow.blocks[0].proj_out.bias)
    assert z_bar.abs().max() > 0


@every
@pytest.mark.parametrize("kind", [TarFlow, TokenFlow])
def test_files_carry_the_transform(name, kind, tmp_path):
    flow = flow_of(name, torch.float32) if kind is TokenFlow else random_flow(transform=name)
    x = torch.randn(2, T, D) if kind is TokenFlow else torch.randn(2, 1, 8, 8)
    flow.save_pretrained(tmp_path / "flow")
    assert json.loads((tmp_path / "flow" / "config.json").read_text())["transform"] == name
    torch.save(flow.state_dict(), tmp_path / "flow.pth")
    more = {"in_channels": 1} if kind is TarFlow else {"head_size": flow.config["head_size"]}
    for other in (
        kind.from_pretrained(tmp_path / "flow"),
        kind.from_checkpoint(tmp_path / "flow.pth", **more),
        pickle.loads(pickle.dumps(flow)),
        kind(**flow.config),
    ):
        other.load_state_dict(flow.state_dict())
        assert other.config == flow.config and str(other.blocks[1].transform) == name
        assert torch.equal(other(x)[0], flow(x)[0])


@every
def test_the_state_of_another_transform_is_refused_with_both_names(name, tmp_path):
    flows = {
        kind: random_flow(k, transform=kind)
        for k, kind in enumerate([name, "affine", "shift", "logistic_mixture:4", "spline:5"])
    }
    for mine, flow in flows.items():
        for theirs, other in flows.items():
            if mine == theirs:
                continue
            before = {key: value.clone() for key, value in flow.state_dict().items()}
            message = f"load_state_dict: blocks.0 must have the transform {mine}, got {theirs}"
            with pytest.raises(ValueError, match=message):
                flow.load_state_dict(other.state_dict())
            assert all(torch.equal(value, before[key]) for key, value in flow.state_dict().items())
            other.save_pretrained(tmp_path / "flow")
            config = {"model_type": "tarflow"} | flow.config
            (tmp_path / "flow" / "config.json").write_text(json.dumps(config))
            with pytest.raises(ValueError, match=message.replace("load_state_dict", "from_pretrained")):
                TarFlow.from_pretrained(tmp_path / "flow")


@every
def test_guidance_is_refused_before_anything_is_drawn(name):
    flow = flow_of(name, torch.float32, num_classes=3)
    state = torch.get_rng_state()
    message = f"guidance must be 0 for the transform '{name}', because no rule has been published"
    for call in (
        lambda: flow.sample(2, 1, guidance=1.0),
        lambda: flow.sample_and_log_prob(2, 1, guidance=1.0),
        lambda: flow.inverse(torch.zeros(2, T, D), 1, guidance=1.0),
        lambda: flow.blocks[0].reverse(torch.zeros(2, T, D), None, 1.0),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.isfinite(flow.sample(2, torch.tensor([0, 2]), seed=0)).all()


@every
def test_an_untrained_flow_is_near_the_identity(name):
    torch.manual_seed(0)
    flow, x = TokenFlow(T, D, 64, 4, 1, transform=name), torch.randn(64, T, D)
    z, log_det = flow(x)
    assert 0 < (z - x).abs().mean() < 0.3 and log_det.abs().max() < T * D
    for block in flow.blocks:
        torch.nn.init.zeros_(block.proj_out.bias)
    z, log_det = flow(x)
    assert (z - x).abs().max() < 1e-5 and log_det.abs().max() < 1e-5


def test_a_name_an_object_and_none_are_the_same():
    sizes = (T, D, 64, 1, 1)
    default = TokenFlow(*sizes, transform="logistic_mixture")
    assert default.config["transform"] == "logistic_mixture:8"
    assert TokenFlow(*sizes, transform=LogisticMixture()).config == default.config
    assert TokenFlow(*sizes, transform=LogisticMixture(2)).config["transform"] == "logistic_mixture:2"
    assert TokenFlow(*sizes, transform="spline").config == TokenFlow(*sizes, transform=Spline(8)).config
    assert TokenFlow(*sizes, transform="affine").config == TokenFlow(*sizes).config
    assert "transform" not in TokenFlow(*sizes).config
    assert TokenFlow(*sizes, transform="shift").config == TokenFlow(*sizes, nvp=False).config
