"""Laws of a normalizing flow that must hold with any weights. They are tested on drawn shapes, in float64."""

import math

import pytest
import torch
from flows import random_flow, random_images, random_noise, twin
from hypothesis import given, settings
from hypothesis import strategies as st

shapes = st.fixed_dictionaries(
    {
        "in_channels": st.sampled_from([1, 3]),
        "img_size": st.tuples(st.integers(1, 5), st.integers(1, 4)),  # in patches; T may be 1 or odd
        "patch_size": st.sampled_from([1, 2]),
        "num_blocks": st.integers(1, 3),
        "layers_per_block": st.integers(1, 2),
        "nvp": st.booleans(),
        "num_classes": st.sampled_from([0, 3]),
    }
)
batches = st.integers(0, 3)
law = settings(max_examples=40, deadline=None, derandomize=True)


def make(config, B, seed=0):
    config = dict(config)
    p = config["patch_size"]
    config["img_size"] = tuple(side * p for side in config["img_size"])
    model = random_flow(seed, torch.float64, **config)
    labels = torch.arange(B) % (config["num_classes"] + 1) - 1 if config["num_classes"] else None  # -1: no label
    return model, labels


@law
@given(shapes, batches)
def test_reverse_undoes_forward(config, B):
    model, y = make(config, B)
    x = random_images(model, B)
    z, outputs, _ = model(x, y)
    assert len(outputs) == len(model.blocks) and torch.equal(outputs[-1], z)
    back = model.reverse(z / model.var.sqrt(), y)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-9)


@law
@given(shapes, batches)
def test_forward_undoes_reverse(config, B):
    model, y = make(config, B)
    noise = random_noise(model, B)
    z, _, _ = model(model.reverse(noise, y), y)
    torch.testing.assert_close(z / model.var.sqrt(), noise, rtol=0, atol=1e-9)


@settings(law, max_examples=15)
@given(shapes)
def test_log_det_is_that_of_the_jacobian(config):
    model, y = make(config, 1)
    x = random_images(model, 1)
    _, _, logdets = model(x, y)
    jacobian = torch.autograd.functional.jacobian(lambda t: model(t, y)[0], x).reshape(x.numel(), x.numel())
    torch.testing.assert_close(
        logdets * x.numel(), torch.linalg.slogdet(jacobian).logabsdet[None], rtol=1e-9, atol=1e-9
    )


@settings(law, max_examples=15)
@given(shapes, st.booleans())
def test_a_block_is_triangular(config, flipped):
    model, y = make({**config, "num_blocks": 2}, 1)
    block, T, D = model.blocks[int(flipped)], model.num_tokens, model.token_size
    x = torch.randn(1, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    jacobian = torch.autograd.functional.jacobian(lambda t: block(t, y)[0], x).reshape(T, D, T, D)
    if block.flip:
        jacobian = jacobian.flip(0, 2)
    for i in range(T):
        assert not jacobian[i, :, i + 1 :].any(), "a token must not depend on a later one"
        own = jacobian[i, :, i]
        assert torch.equal(own, torch.diag(own.diagonal())), "a token's own part must be elementwise"
        assert (own.diagonal() > 0).all()


@pytest.mark.filterwarnings("ignore:reverse. guidance changes nothing")
@law
@given(shapes, batches)
def test_tarflow_is_the_reference(config, B):
    model, y = make(config, B)
    reference, x, noise = twin(model), random_images(model, B), random_noise(model, B)
    (z, outputs, logdets), (z_ref, outputs_ref, logdets_ref) = model(x, y), reference(x, y)
    torch.testing.assert_close([z, logdets, *outputs], [z_ref, logdets_ref, *outputs_ref], rtol=0, atol=1e-10)
    for arguments in (
        {},
        {"guidance": 1.5, "attn_temp": 0.7},
        {"guidance": 0.5, "annealed_guidance": True, "guide_what": "b"},
    ):
        ours, theirs = (m.reverse(noise, y, **arguments, return_sequence=True) for m in (model, reference))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


@law
@given(shapes, batches)
def test_patchify_and_back(config, B):
    model, _ = make(config, B)
    x = random_images(model, B)
    tokens = model.patchify(x)
    p, (rows, columns) = model.patch_size, model.grid
    assert tokens.shape == (B, rows * columns, model.in_channels * p * p)
    assert torch.equal(model.unpatchify(tokens), x)
    for t in range(tokens.size(1)):
        row, column = divmod(t, columns)
        patch = x[:, :, row * p : (row + 1) * p, column * p : (column + 1) * p]
        assert torch.equal(tokens[:, t], patch.flatten(1))


@settings(law, max_examples=10)
@given(shapes)
def test_log_prob_integrates_the_change_of_variables(config):
    model, y = make(config, 2)
    x = random_images(model, 2)
    z, _, logdets = model(x, y)
    prior = torch.distributions.Normal(torch.zeros(()).double(), model.var.sqrt())
    expected = prior.log_prob(z).sum(dim=(1, 2)) + logdets * model.var.numel()
    torch.testing.assert_close(model.log_prob(x, y), expected, rtol=1e-10, atol=1e-10)


def test_bits_per_dim_of_a_flow_with_a_known_density():
    """If proj_out is zero, the flow is the identity, so bits/dim must be those of N(0, 1) at the dequantised pixels."""
    model = random_flow(scale=0, img_size=4, dtype=torch.float64)
    model.var.fill_(1)
    x = torch.randint(0, 17, (3, 1, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    u = torch.rand(x.shape, generator=torch.Generator().manual_seed(7))
    pixels = ((x + u) / 17 * 2 - 1).double()
    nats = 0.5 * pixels.square() + 0.5 * math.log(2 * math.pi)
    expected = nats.mean(dim=(1, 2, 3)) / math.log(2) + math.log2(17 / 2)
    torch.testing.assert_close(model.bits_per_dim(x, levels=17, seed=7), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("limit", [1, 2**31])
def test_denoise_is_a_step_along_the_score(limit):
    model = random_flow(dtype=torch.float64, num_classes=3, in_channels=3)
    x, y, sigma = random_images(model, 5), torch.tensor([0, 1, 2, -1, 0]), 0.3
    clean = model.denoise(x, y, sigma, memory_limit=limit)
    epsilon = 1e-5
    direction = random_images(model, 5, seed=9)
    up, down = (model.log_prob(x + s * epsilon * direction, y) for s in (1, -1))
    slope = ((clean - x) / sigma**2 * direction).sum(dim=(1, 2, 3))
    torch.testing.assert_close(slope, ((up - down) / (2 * epsilon)).detach(), rtol=1e-6, atol=1e-6)
    assert not clean.requires_grad


@pytest.mark.parametrize("where", ["the images", "the flow", "the call"])
def test_denoise_takes_what_inference_mode_made(where):
    model, x, y = random_flow(num_classes=3), random_images(random_flow(), 3), torch.tensor([0, -1, 2])
    expected = model.denoise(x, y, 0.3)
    with torch.inference_mode():
        if where == "the flow":
            model = random_flow(num_classes=3)
        if where == "the images":
            x, y = x.clone(), y.clone()
        if where == "the call":
            clean = model.denoise(x, y, 0.3, batch_size=2)
    if where != "the call":
        clean = model.denoise(x, y, 0.3, batch_size=2)
    torch.testing.assert_close(clean, expected, rtol=1e-6, atol=1e-6)
    assert not clean.is_inference() and not clean.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


def test_classify_is_bayes_rule():
    model = random_flow(dtype=torch.float64, num_classes=4)
    x = random_images(model, 6)
    joint = torch.stack([model.log_prob(x, torch.full((6,), c)) for c in range(4)], dim=1)
    expected = joint - torch.logsumexp(joint, dim=1, keepdim=True)
    torch.testing.assert_close(model.classify(x), expected.detach(), rtol=0, atol=1e-9)
    torch.testing.assert_close(model.classify(x).exp().sum(dim=1), torch.ones(6).double())


def test_differentiable_reverse_has_the_gradient_of_the_inverse():
    model = random_flow(dtype=torch.float64, num_blocks=2, img_size=4, num_classes=2)
    noise, y = random_noise(model, 1).requires_grad_(), torch.tensor([1])
    assert not model.reverse(noise, y).requires_grad
    assert torch.autograd.gradcheck(
        lambda t: model.reverse(t, y, guidance=0.5, differentiable=True), noise, eps=1e-6, atol=1e-6
    )
    loss = model.reverse(noise, y, differentiable=True).square().sum()
    assert all(
        g is not None and g.abs().sum() > 0
        for g in torch.autograd.grad(loss, list(model.blocks[0].attn_blocks.parameters()))
    )


def test_rows_with_negative_labels_are_rows_without_labels():
    model = random_flow(num_classes=3)
    x, noise = random_images(model, 3), random_noise(model, 3)
    mixed = torch.tensor([2, -1, -5])
    torch.testing.assert_close(model(x, mixed)[0][1:], model(x)[0][1:], rtol=0, atol=1e-6)
    torch.testing.assert_close(model.reverse(noise, mixed)[1:], model.reverse(noise)[1:], rtol=0, atol=1e-6)
    assert not torch.allclose(model.reverse(noise, mixed)[0], model.reverse(noise)[0], atol=1e-3)


def test_update_prior_moves_a_tenth():
    model = random_flow(nvp=False)
    before, z = model.var.clone(), random_noise(model, 8)
    model.update_prior(z)
    torch.testing.assert_close(model.var, 0.9 * before + 0.1 * z.square().mean(dim=0))
