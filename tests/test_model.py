"""The promises of a drop-in: keys in both directions, dtypes, autocast, torch.compile, copies, samples from seeds."""

import copy
import json
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from flows import random_flow, random_images, random_noise, twin
from torch.optim.swa_utils import AveragedModel

import tarflow_fast
from tarflow_fast import Model, ReferenceTarFlow, TarFlow
from tarflow_fast.verify.rule import largest_error_and_bound

CONFIG = dict(in_channels=1, img_size=8, patch_size=2, channels=64, num_blocks=2, layers_per_block=2, num_classes=3)
# The rule by tensor is applied to few tokens and many rows. Among 24 rows in 16 bits, one number was off by more than
# twice the largest error of plain PyTorch.
JUDGED, ROWS = CONFIG | dict(img_size=(4, 8)), 96


def test_model_is_tarflow():
    assert Model is TarFlow
    model = TarFlow(3, 8, 4, 64, 3, 1, False, 5)
    assert (model.num_tokens, model.token_size, model.nvp, model.num_classes) == (4, 48, False, 5)
    assert [block.flip for block in model.blocks] == [False, True, False]


@pytest.mark.parametrize("nvp", [True, False])
@pytest.mark.parametrize("num_classes", [0, 3])
def test_state_dict_has_the_original_keys_both_ways(nvp, num_classes):
    config = CONFIG | {"nvp": nvp, "num_classes": num_classes}
    ours, original = random_flow(**config), ReferenceTarFlow(**config)
    ours_state, original_state = ours.state_dict(), original.state_dict()
    assert {k: (v.shape, v.dtype) for k, v in ours_state.items()} == {
        k: (v.shape, v.dtype) for k, v in original_state.items()
    }
    for key in ours_state:
        if key.endswith("attn_mask"):
            assert torch.equal(ours_state[key], original_state[key])
    original.load_state_dict(ours_state, strict=True)
    fresh = TarFlow(**config)
    fresh.load_state_dict(original.state_dict(), strict=True)
    without_masks = {k: v for k, v in original.state_dict().items() if not k.endswith("attn_mask")}
    fresh.load_state_dict(without_masks, strict=True)
    x = random_images(ours)
    assert torch.equal(fresh(x)[0], ours(x)[0])
    with pytest.raises(RuntimeError, match="Missing key"):
        fresh.load_state_dict({k: v for k, v in without_masks.items() if k != "var"}, strict=True)
    assert not any("mask" in name for name, _ in ours.named_buffers())


def test_start_values():
    torch.manual_seed(0)
    model = TarFlow(3, 32, 4, 256, 2, 1, num_classes=50)
    for block in model.blocks:
        assert not block.proj_out.weight.any()
        assert 0.009 < block.pos_embed.std() < 0.011 and 0.009 < block.class_embed.std() < 0.011
    x = random_images(model)
    z, _, logdets = model(x, torch.tensor([1, 2]))
    reference = ReferenceTarFlow(**model.config)
    reference.load_state_dict(model.state_dict())
    torch.testing.assert_close((z, logdets), reference(x, torch.tensor([1, 2]))[::2])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_work(dtype):
    model, y = random_flow(**JUDGED).to(dtype), torch.tensor([0, -1, 2]).repeat(ROWS // 3)
    truth, plain = twin(model), twin(model, dtype)
    if dtype == torch.float64:
        plain = summed_backwards(plain)  # otherwise it would be the truth itself, and only 2 ulp would be allowed
    x, noise = random_images(model, ROWS), random_noise(model, ROWS)
    z, _, logdets = model(x, y)
    assert z.dtype == dtype and logdets.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for ours, exact, ref in zip((z, logdets), truth(x.double(), y)[::2], plain(x, y)[::2], strict=True):
        within_rule(ours, exact, ref)
    images = model.reverse(noise, y, guidance=0.5)
    assert images.dtype == dtype
    within_rule(images, truth.reverse(noise.double(), y, guidance=0.5), plain.reverse(noise, y, guidance=0.5))
    model.get_loss(z, logdets).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def summed_backwards(reference):
    """The same function with the hidden units of every MLP in reverse order, so that PyTorch rounds differently."""
    with torch.no_grad():
        for main in (layer.mlp.main for block in reference.blocks for layer in block.attn_blocks):
            for parameter, dim in ((main[0].weight, 0), (main[0].bias, 0), (main[2].weight, 1)):
                parameter.copy_(parameter.flip(dim))
    return reference


def within_rule(ours, exact, plain):
    """Checks the error rule by tensor (tarflow_fast/verify/rule.py)."""
    error, allowed = largest_error_and_bound(ours, exact, plain)
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


def test_autocast_keeps_float32_results_and_log_dets():
    model = random_flow(**JUDGED)
    truth, plain, x, noise = (
        twin(model),
        twin(model, torch.float32),
        random_images(model, ROWS),
        random_noise(model, ROWS),
    )
    with torch.autocast("cpu", torch.bfloat16):
        z, outputs, logdets = model(x)
        z_plain, _, logdets_plain = plain(x)
        images, images_plain = model.reverse(noise), plain.reverse(noise)
    assert {t.dtype for t in (z, logdets, images, *outputs)} == {torch.float32}
    within = dict(
        zip(
            "zli",
            (
                (z, truth(x.double())[0], z_plain),
                (logdets, truth(x.double())[2], logdets_plain),
                (images, truth.reverse(noise.double()), images_plain),
            ),
            strict=True,
        )
    )
    for ours, exact, reference in within.values():
        within_rule(ours, exact, reference.float())
        assert (ours - exact).abs().max() > 1e-5, "autocast was not honoured: the result is too exact for bfloat16"


NARROW = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("images", NARROW)
@pytest.mark.parametrize("autocast", NARROW[1:])
@pytest.mark.parametrize("half", [False, True])  # PyTorch's layer_norm refuses parameters of the other 16-bit type
def test_autocast_takes_images_of_any_dtype_plain_pytorch_takes(half, images, autocast):
    parameters = autocast if half else torch.float32
    model = random_flow(**JUDGED).to(parameters)
    truth, plain, y = twin(model), twin(model, parameters), torch.tensor([0, -1, 2]).repeat(ROWS // 3)
    x, noise = random_images(model, ROWS).to(images), random_noise(model, ROWS).to(images)
    with torch.autocast("cpu", autocast):
        ours = *model(x, y)[::2], model.reverse(noise, y)
        theirs = *plain(x, y)[::2], plain.reverse(noise, y)
        gradient = torch.autograd.grad(model.log_prob(x.requires_grad_(), y).sum(), x)[0]
    exact = *truth(x.detach().double(), y)[::2], truth.reverse(noise.double(), y)
    assert [t.dtype for t in ours] == [t.dtype for t in theirs] and ours[0].dtype == images
    for each in zip(ours, exact, theirs, strict=True):
        within_rule(*each)
    assert gradient.dtype == images and gradient.isfinite().all() and gradient.any()


def test_autocast_refuses_float64_beside_other_parameters_early():
    """Autocast leaves float64 tensors as they are, so the first layer would get two dtypes."""
    wide, narrow = random_flow(**CONFIG, dtype=torch.float64), random_flow(**CONFIG)
    x, noise = random_images(narrow), random_noise(narrow)
    message = "x must have the model's dtype torch.float{}, got torch.float{}$"
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(TypeError, match="^forward: " + message.format(32, 64)):
            narrow(x.double())
        with pytest.raises(TypeError, match="^reverse: " + message.format(32, 64)):
            narrow.reverse(noise.double())
        with pytest.raises(TypeError, match="^forward: " + message.format(64, 16)):
            wide(x.half())
        torch.testing.assert_close(wide(x.double())[0], twin(wide)(x.double())[0], rtol=0, atol=1e-12)
        assert torch.equal(wide.reverse(noise.bfloat16()), wide.reverse(noise.bfloat16().double()))


@pytest.mark.parametrize("nvp", [True, False])
def test_compile_without_a_graph_break(nvp):
    torch._dynamo.reset()
    model = random_flow(**CONFIG, nvp=nvp)
    x, y = random_images(model, 3), torch.tensor([0, -1, 2])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    z, _, logdets = compiled(x, y)
    expected = model(x, y)
    torch.testing.assert_close((z, logdets), expected[::2], rtol=1e-5, atol=1e-5)
    model.get_loss(z, logdets).backward()
    compiled_grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.get_loss(expected[0], expected[2]).backward()
    torch.testing.assert_close(compiled_grads, [p.grad for p in model.parameters()], rtol=1e-4, atol=1e-6)


def test_copies_and_averages():
    model = random_flow(**CONFIG)
    x, y = random_images(model), torch.tensor([0, 1])
    expected = model(x, y)[0]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), AveragedModel(model).module):
        assert torch.equal(other(x, y)[0], expected) and other.config == model.config
        assert torch.equal(other.reverse(random_noise(model), y), model.reverse(random_noise(model), y))


def test_meta_device_and_assign():
    model = random_flow(**CONFIG)
    with torch.device("meta"):
        empty = TarFlow(**CONFIG)
    assert empty.var.is_meta
    empty.load_state_dict(model.state_dict(), strict=True, assign=True)
    x = random_images(model)
    assert torch.equal(empty(x)[0], model(x)[0])


def test_frozen_weights_still_give_input_gradients():
    model = random_flow(**CONFIG)
    x, y = random_images(model).requires_grad_(), torch.tensor([0, 1])
    expected = torch.autograd.grad(model.log_prob(x, y).sum(), x)[0]
    model.requires_grad_(False)
    torch.testing.assert_close(torch.autograd.grad(model.log_prob(x, y).sum(), x)[0], expected, rtol=0, atol=0)


def test_functional_transforms_work():
    model = random_flow(**CONFIG | {"num_classes": 0})
    x = random_images(model, 1)[0]
    jacobian = torch.func.jacrev(lambda t: model(t[None])[0])(x)
    expected = torch.autograd.functional.jacobian(lambda t: model(t[None])[0], x)
    torch.testing.assert_close(jacobian, expected, rtol=1e-5, atol=1e-6)
    per_row = torch.func.vmap(torch.func.grad(lambda t: model.log_prob(t[None]).sum()))(random_images(model, 3))
    images = random_images(model, 3).requires_grad_()
    torch.testing.assert_close(
        per_row, torch.autograd.grad(model.log_prob(images).sum(), images)[0], rtol=1e-4, atol=1e-4
    )


def test_a_hooked_or_adapted_layer_is_honoured():
    """A LoRA-like wrapper around a Linear must change the inverse exactly as it changes the forward pass."""
    model = random_flow(**CONFIG | {"num_classes": 0}, dtype=torch.float64)

    class Adapter(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.delta = base, torch.nn.Linear(64, 192, dtype=torch.float64)

        def forward(self, h):
            return self.base(h) + 0.1 * self.delta(h)

    plain = model.reverse(random_noise(model))
    attention = model.blocks[1].attn_blocks[0].attention
    attention.qkv = Adapter(attention.qkv)
    model.blocks[0].attn_blocks[1].mlp.main[0].register_forward_hook(lambda module, inputs, output: output * 1.1)
    x = random_images(model)
    torch.testing.assert_close(model.reverse(model(x)[0] / model.var.sqrt()), x, rtol=0, atol=1e-9)
    assert not torch.allclose(model.reverse(random_noise(model)), plain, atol=1e-3)


def test_sample_from_a_seed():
    model = random_flow(**CONFIG)
    y = torch.arange(7) % 3
    images = model.sample(7, y, guidance=1.0, seed=3)
    assert images.shape == (7, 1, 8, 8) and not images.requires_grad
    noise = torch.randn(7, 16, 4, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(images, model.reverse(noise, y, guidance=1.0), rtol=0, atol=0)
    torch.testing.assert_close(model.sample(7, y, guidance=1.0, seed=3, batch_size=2), images, rtol=0, atol=1e-5)
    assert torch.equal(model.sample(7, y, guidance=1.0, generator=torch.Generator().manual_seed(3)), images)
    assert not torch.equal(model.sample(7, y, guidance=1.0, seed=4), images)
    assert torch.equal(model.sample(2, 1, seed=3), model.sample(2, torch.tensor([1, 1]), seed=3))
    stages = model.sample(7, y, guidance=1.0, seed=3, return_sequence=True)
    assert len(stages) == 3 and torch.equal(stages[-1], images)
    torch.testing.assert_close(stages[0], model.unpatchify(noise), rtol=0, atol=0)
    assert model.sample(0, seed=1).shape == (0, 1, 8, 8)


def test_one_label_for_all_and_numbers_of_numpy():
    model, three = random_flow(num_classes=3), torch.tensor([2, 2])
    x, z, pixels = random_images(model), random_noise(model), torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    calls = [
        lambda y: model(x, y)[0],
        lambda y: model.log_prob(x, y),
        lambda y: model.denoise(x, y),
        lambda y: model.bits_per_dim(pixels, y, seed=0),
        lambda y: model.reverse(z, y, 0.5),
        lambda y: model.sample(2, y, seed=0),
    ]
    for call in calls:
        assert torch.equal(call(2), call(three)) and torch.equal(call(np.int64(2)), call(three))
        assert torch.equal(call(-5), call(three - 3)) and not torch.equal(call(0), call(three))
    again = TarFlow(*(np.int32(size) for size in (1, 8, 2, 64, 2, 1)), num_classes=np.uint8(3))
    assert again.config == model.config and json.dumps(again.config)
    assert torch.equal(
        model.sample(np.int64(2), seed=np.int64(1), guidance=np.float32(0.5), y=1, batch_size=np.int16(1)),
        model.sample(2, seed=1, guidance=0.5, y=1),
    )


def test_the_first_stage_is_not_the_noise_itself():
    model = random_flow(patch_size=1, img_size=4)
    noise = random_noise(model)
    before = noise.clone()
    stages = model.reverse(noise, return_sequence=True)
    assert torch.equal(stages[0], model.unpatchify(before))
    stages[0].zero_()
    assert torch.equal(noise, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"guidance": 2.0}, "guidance changes nothing without labels, unless attn_temp is other than 1"),
        ({"attn_temp": 0.5}, "attn_temp changes nothing without guidance"),
    ],
)
def test_what_changes_nothing_is_told(fresh_warnings, arguments, message):
    model = random_flow(num_classes=3)
    noise = random_noise(model)
    with pytest.warns(RuntimeWarning, match=f"^reverse: {message}$"):
        images = model.reverse(noise, **arguments)
    assert torch.equal(images, model.reverse(noise))
    assert not torch.equal(model.reverse(noise, guidance=2.0, attn_temp=0.5), images)


def test_modules_are_found_on_the_package():
    code = "import tarflow_fast as t; print(t.info.info()['versions']['tarflow_fast'], 'TarFlow' in dir(t))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == f"{tarflow_fast.__version__} True\n", done.stderr


def test_nonsquare_config_round_trip(tmp_path):
    model = random_flow(**CONFIG | {"img_size": (4, 8)})
    assert model.config["img_size"] == [4, 8] and TarFlow(1, (8, 8), 2, 64, 1, 1).config["img_size"] == 8
    model.save_pretrained(tmp_path)
    again = TarFlow.from_pretrained(tmp_path)
    assert again.sample(2, seed=0).shape == (2, 1, 4, 8)
    assert torch.equal(again.sample(2, seed=0), model.sample(2, seed=0))


def test_progress_is_shown_when_asked(capsys):
    model = random_flow(**CONFIG)
    model.sample(1, seed=0)
    assert capsys.readouterr().err == ""
    model.reverse(random_noise(model), progress=True)
    assert "reverse: " in capsys.readouterr().err
    model.sample(5, seed=0, batch_size=2, progress=True)
    told = capsys.readouterr().err
    assert "sample: " in told
    total = 3 * len(model.blocks) * (model.num_tokens - 1)
    assert set(re.findall(r"\d+/(\d+) ", told)) == {str(total)}, "all parts must share one progress bar"


def test_the_default_dtype_of_the_process_changes_nothing():
    model = random_flow(**CONFIG)
    y, pixels = torch.tensor([0, 1]), torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    expected = model.sample(2, y, guidance=1.0, attn_temp=0.7, seed=0), model.bits_per_dim(pixels, seed=0)
    torch.set_default_dtype(torch.float64)
    try:
        got = model.sample(2, y, guidance=1.0, attn_temp=0.7, seed=0), model.bits_per_dim(pixels, seed=0)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(ours, right) for ours, right in zip(got, expected, strict=True))


def test_a_weight_that_is_no_parameter_is_honoured(fresh_warnings):
    model = random_flow(**CONFIG)
    noise, expected = random_noise(model), model.reverse(random_noise(model))
    layer = model.blocks[0].proj_in
    weight = layer.weight.detach()
    del layer.weight
    layer.weight = weight
    with pytest.warns(RuntimeWarning, match="inverts block 0 on 'torch' .* proj_in keeps its weight or bias elsewhere"):
        images = model.reverse(noise)
    torch.testing.assert_close(images, expected, rtol=1e-5, atol=1e-5)
