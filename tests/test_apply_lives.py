"""A model's life after `apply_to`: copies, new weights, training, hooks, and a return to its own code if needed."""

import copy
import gc
import io
import pickle
import threading
import weakref

import pytest
import strangers
import torch
from compare import same_bits
from test_apply import CONFIG, labels, noise, own, truth_of
from torch.nn.utils import parametrizations

from tarflow_fast import ReferenceTarFlow, TarFlow, apply_to, remove_from

pytestmark = pytest.mark.usefixtures("fresh_warnings")


def close(model, z, y=None):
    """True if the applied model gives what its own code gives with its present weights. Otherwise it fails."""
    torch.testing.assert_close(model.reverse(z, y), own(model, z, y), rtol=1e-4, atol=1e-5)
    return True


def own_code(reason):
    return pytest.warns(RuntimeWarning, match=f"^reverse of a Model runs on its own code: {reason}")


def test_nothing_but_the_class_changes_and_remove_from_puts_it_back():
    model, other = strangers.images(), strangers.images(1)
    before, state = dict(vars(model)), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    draws = torch.get_rng_state()
    assert apply_to(model) is model and apply_to(other) is other
    assert torch.equal(torch.get_rng_state(), draws)
    assert isinstance(model, strangers.Model) and type(model) is not strangers.Model and type(other) is type(model)
    assert (type(model).__name__, type(model).__module__) == ("Model", "strangers")
    assert repr(model) == repr(strangers.images())
    assert vars(model) == before
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert apply_to(model) is model and type(model).__bases__ == (strangers.Model,), "apply_to ran twice"
    assert remove_from(model) is model
    assert type(model) is strangers.Model and vars(model) == before and type(other) is not strangers.Model
    assert remove_from(model) is model and type(model) is strangers.Model
    z = noise(model)
    with torch.no_grad():
        assert same_bits(model.reverse(z.clone()), own(model, z))
    for function in (apply_to, remove_from):
        with pytest.raises(TypeError, match=rf"^{function.__name__}: model must be a torch.nn.Module, got dict$"):
            function({})
    with pytest.raises(ValueError, match=r"^apply_to: model is a TarFlow of tarflow_fast, which needs no help$"):
        apply_to(TarFlow(**CONFIG))


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        copy.copy,
        saved,
        *(lambda model, p=p: pickle.loads(pickle.dumps(model, p)) for p in range(pickle.HIGHEST_PROTOCOL + 1)),
    ],
)
def test_copies_are_plain_originals(copied):
    model = apply_to(strangers.images())
    other = copied(model)
    assert type(other) is strangers.Model
    z = noise(model, 4)
    with torch.no_grad():
        assert same_bits(other.reverse(z.clone()), own(model, z))
    assert same_bits(apply_to(other).reverse(z), model.reverse(z))
    assert type(other) is type(model)


def test_a_pickle_needs_no_tarflow_fast():
    assert b"tarflow_fast" not in pickle.dumps(apply_to(strangers.images()))


def test_weights_are_those_of_the_moment():
    model, z, y = apply_to(strangers.images()), noise(strangers.images()), labels()
    state = strangers.images(5).state_dict()
    assert close(model, z, y)
    first = model.reverse(z, y)
    model.load_state_dict(state)
    assert not torch.allclose(model.reverse(z, y), first, atol=1e-3)
    assert same_bits(model.reverse(z, y), apply_to(strangers.images(5)).reverse(z, y))
    model.load_state_dict(strangers.images().state_dict(), assign=True)
    assert same_bits(model.reverse(z, y), first)
    model.blocks[1].attn_blocks[0].mlp.main[0].weight.data.mul_(1.5)
    assert close(model, z, y) and not torch.allclose(model.reverse(z, y), first, atol=1e-4)
    model.blocks[0].proj_out = torch.nn.Linear(64, 8).requires_grad_(False)
    model.blocks[0].proj_out.weight.mul_(0.1)
    model.var.mul_(2)
    assert close(model, z, y)
    model.blocks[0].attn_blocks[1].attention.norm.eps = 0.1
    with pytest.warns(RuntimeWarning, match=r"inverts block 0 on 'torch' .* attn_blocks.1.attention.norm has eps 0.1"):
        assert close(model, z, y)


@pytest.mark.parametrize("fused", [False, True])
def test_training_goes_on(fused):
    """Every training step is the same as for an untouched model, and `reverse` uses the new weights."""
    model, plain = apply_to(strangers.images()), strangers.images()
    z, y = noise(model), labels()
    pictures = torch.randn(24, 1, 8, 8, generator=torch.Generator().manual_seed(4))
    optimizers = [torch.optim.AdamW(each.parameters(), lr=1e-3, fused=fused) for each in (model, plain)]
    before = model.reverse(z, y)
    for _ in range(2):
        for each, optimizer in zip((model.train(), plain.train()), optimizers, strict=True):
            latent, outputs, logdets = each(pictures, y)
            assert len(outputs) == 2
            optimizer.zero_grad()
            each.get_loss(latent, logdets).backward()
            optimizer.step()
        assert all(same_bits(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
        assert close(model, z, y)
    assert not torch.allclose(model.reverse(z, y), before, atol=1e-3)


def test_other_dtypes_where_the_models_own_code_fails():
    model, z, y = apply_to(strangers.images()), noise(strangers.images()), labels()
    model.double()
    exact = truth_of(model).reverse(z.double(), y)
    torch.testing.assert_close(model.reverse(z.double(), y), exact, rtol=0, atol=1e-12)
    with pytest.raises(RuntimeError):
        own(model, z.double(), y)
    model.to(torch.bfloat16)
    rounded = ReferenceTarFlow(**CONFIG)
    rounded.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    plain = copy.deepcopy(rounded).bfloat16().reverse(z.bfloat16(), y)
    exact = rounded.double().reverse(z.bfloat16().double(), y)
    error, allowed = ((each.double() - exact).abs().max() for each in (model.reverse(z.bfloat16(), y), plain))
    assert error <= 2 * allowed


def test_hooks_of_the_model_fire():
    model, seen = apply_to(strangers.images()), []
    model.register_forward_hook(lambda module, inputs, output: seen.append(output[0].shape))
    model(torch.zeros(2, 1, 8, 8))
    assert seen == [(2, 16, 4)] and close(model, noise(model))


class Adapter(torch.nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base, self.delta = base, torch.nn.Linear(base.in_features, base.out_features)

    def forward(self, h):
        return self.base(h) + 0.5 * self.delta(h)


def hook(model, monkeypatch):
    handle = model.blocks[1].attn_blocks[0].mlp.main[0].register_forward_hook(lambda module, inputs, out: 1.5 * out)
    return handle.remove


def global_hook(model, monkeypatch):
    return torch.nn.modules.module.register_module_forward_hook(lambda module, inputs, output: None).remove


def adapter(model, monkeypatch):
    attention = model.blocks[0].attn_blocks[1].attention
    base, attention.qkv = attention.qkv, Adapter(attention.qkv)
    return lambda: setattr(attention, "qkv", base)


def parametrization(model, monkeypatch):
    layer = model.blocks[0].proj_in
    base = copy.deepcopy(layer)
    parametrizations.weight_norm(layer).parametrizations.weight.original0.data.mul_(1.3)
    return lambda: setattr(model.blocks[0], "proj_in", base)


def instance_forward(model, monkeypatch):
    attention = model.blocks[0].attn_blocks[0].attention
    attention.forward = lambda h, *args: 0.5 * strangers.Attention.forward(attention, h, *args)
    return lambda: delattr(attention, "forward")


def instance_reverse(model, monkeypatch):
    model.blocks[1].reverse = lambda *args: strangers.MetaBlock.reverse(model.blocks[1], *args) + 1
    return lambda: delattr(model.blocks[1], "reverse")


def class_method(model, monkeypatch):
    plain = strangers.MetaBlock.split
    monkeypatch.setattr(strangers.MetaBlock, "split", lambda self, h: (each.tanh() for each in plain(self, h)))
    return monkeypatch.undo


def subclassed(model, monkeypatch):
    model.blocks[0].attn_blocks[0].mlp.__class__ = type("Squared", (strangers.MLP,), {})
    return lambda: setattr(model.blocks[0].attn_blocks[0].mlp, "__class__", strangers.MLP)


def attribute(model, monkeypatch):
    model.blocks[0].attn_blocks[0].attention.head_channels = 32
    return lambda: setattr(model.blocks[0].attn_blocks[0].attention, "head_channels", 64)


def number(model, monkeypatch):
    model.blocks[1].clip = 4.0
    return lambda: delattr(model.blocks[1], "clip")


def permutation(model, monkeypatch):
    def put(new):
        del model.blocks[1].permutation
        model.blocks[1].permutation = new

    before = model.blocks[1].permutation
    put(strangers.PermutationRoll(3))
    return lambda: put(before)


def another_block(model, monkeypatch):
    model.blocks.append(copy.deepcopy(model.blocks[0]))
    return lambda: model.blocks.pop(2)


def buffer(model, monkeypatch):
    model.blocks[0].register_buffer("scale", torch.ones(3))
    return lambda: delattr(model.blocks[0], "scale")


def norm(model, monkeypatch):
    before = model.blocks[0].attn_blocks[0].mlp.norm
    model.blocks[0].attn_blocks[0].mlp.norm = torch.nn.RMSNorm(64)
    return lambda: setattr(model.blocks[0].attn_blocks[0].mlp, "norm", before)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (hook, "blocks.1.attn_blocks.0.mlp.main.0 has hooks"),
        (global_hook, "hooks are registered for every module"),
        (adapter, "blocks.0.attn_blocks.1.attention.qkv must be a Linear, got a Adapter"),
        (parametrization, "blocks.0.proj_in must be a Linear, got a ParametrizedLinear"),
        (instance_forward, "blocks.0.attn_blocks.0.attention has a forward of its own"),
        (instance_reverse, "blocks.1 has a reverse of its own"),
        (class_method, "a method of MetaBlock was replaced since apply_to looked"),
        (subclassed, "blocks.0.attn_blocks.0.mlp is a Squared, and was a MLP when apply_to looked"),
        (
            attribute,
            r"blocks.0.attn_blocks.0.attention must tell its head size by .*, got \{'head_channels': 32",
        ),
        (number, r"blocks.1 has other attributes than when apply_to looked: \{.*'clip': 4.0\}"),
        (permutation, "blocks.1.permutation is a PermutationRoll, and was a PermutationFlip when apply_to looked"),
        (another_block, "it has 3 blocks, and had 2 when apply_to looked"),
        (buffer, r"blocks.0 has a buffer 'scale' of shape \(3,\), which a TarFlow has not"),
        (norm, "blocks.0.attn_blocks.0.mlp.norm must be a LayerNorm, got a RMSNorm"),
    ],
)
def test_what_comes_later_is_honoured_by_the_models_own_code(change, reason, monkeypatch):
    model = apply_to(strangers.images())
    z, y = noise(model), labels()
    before = model.reverse(z, y)
    undo = change(model, monkeypatch)
    with own_code(reason), torch.no_grad():
        got = model.reverse(z.clone(), y)
    assert same_bits(got, own(model, z, y))
    undo()
    assert same_bits(model.reverse(z, y), before), "the engines must run again after the change is undone"


def test_dropout_in_training_mode_is_left_to_the_models_own_code():
    model, z = strangers.tokens(dropout=0.5), noise(strangers.tokens())
    with torch.no_grad():
        before = apply_to(model).reverse(z)
        model.train()
        with pytest.warns(RuntimeWarning, match="main.2 drops out with p = 0.5 in training mode"):
            dropped = model.reverse(z)
        assert not torch.allclose(dropped[0], before[0], atol=1e-3)
        assert same_bits(model.eval().reverse(z)[0], before[0])


class PermutationList(strangers.PermutationIdentity):
    """A permutation that keeps its order in a list, so that a change shows only when the permutation is called."""

    def __init__(self, places):
        super().__init__()
        self.places = places

    def forward(self, x, dim=1, inverse=False):
        index = torch.tensor(self.places)
        return x.index_select(dim, index.argsort() if inverse else index)


def test_an_order_that_changes_in_place():
    model = strangers.tokens(permutations=[PermutationList([3, 1, 0, 2, 6, 5, 4])])
    z = noise(model)
    with torch.no_grad():
        torch.testing.assert_close(apply_to(model).reverse(z), own(model, z), rtol=1e-4, atol=1e-5)
        model.blocks[0].permutation.places[:] = [6, 5, 0, 1, 2, 3, 4]
        with pytest.warns(RuntimeWarning, match=r"blocks.0 has another size or order of tokens than when apply_to loo"):
            assert same_bits(model.reverse(z)[0], own(model, z)[0])


def test_hooks_are_not_tried_out():
    model, seen = strangers.images(), []
    for each in (model.blocks[0].permutation, model.blocks[0].proj_in):
        handle = each.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
        with pytest.raises(ValueError, match=r"^apply_to: blocks.0.(permutation|proj_in) has hooks$"):
            apply_to(model)
        handle.remove()
    assert seen == []


def test_applying_again_looks_anew():
    model = apply_to(strangers.images())
    z = noise(model)
    model.blocks.append(copy.deepcopy(model.blocks[0]))
    assert close(apply_to(model), z)
    model.blocks[0].proj_in.register_forward_hook(lambda module, inputs, output: None)
    with pytest.raises(ValueError, match=r"^apply_to: blocks.0.proj_in has hooks$"):
        apply_to(model)
    assert type(model) is not strangers.Model


def test_a_class_changed_on_top_is_not_lost():
    model = apply_to(strangers.images())
    model.__class__ = type("Sharded", (type(model),), {})
    for function in (apply_to, remove_from):
        with pytest.raises(ValueError, match=f"^{function.__name__}: the class of the model was changed after"):
            function(model)
    assert close(model, noise(model))


def test_two_models_and_two_threads():
    models = [apply_to(strangers.images(seed)) for seed in (0, 1)]
    z, y = noise(models[0]), labels()
    expected = [own(model, z, y) for model in models]
    assert not torch.allclose(*expected, atol=1e-2)
    got = {}

    def run(number):
        got[number] = [models[number % 2].reverse(z, y) for _ in range(3)]

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, results in got.items():
        for each in results:
            torch.testing.assert_close(each, expected[number % 2], rtol=1e-4, atol=1e-5)
    assert len(got) == 4


def test_nothing_is_kept_alive():
    model = apply_to(strangers.images())
    model.reverse(noise(model))
    gone = [weakref.ref(model), weakref.ref(model.blocks[0].proj_in.weight)]
    del model
    gc.collect()
    assert [each() for each in gone] == [None, None]
