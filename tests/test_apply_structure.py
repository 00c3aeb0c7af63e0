"""The structures that `apply_to` refuses, and the message of each. A refusal changes nothing in the model."""

import re

import pytest
import strangers
import torch
from torch import nn
from torch.nn.utils import parametrizations

from tarflow_fast import ReferenceTarFlow, apply_to

pytestmark = pytest.mark.usefixtures("fresh_warnings")


def refused(model, message):
    """Checks that `apply_to` refuses the model with this message, and that it leaves everything unchanged."""
    kind, attributes = type(model), {name: dict(vars(each)) for name, each in model.named_modules()}
    inner = {name: type(each) for name, each in model.named_modules()}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters, draws = list(model.parameters()), torch.get_rng_state()
    with pytest.raises(ValueError, match=f"^apply_to: {message}$"):
        apply_to(model)
    assert type(model) is kind and torch.equal(torch.get_rng_state(), draws)
    assert {name: vars(each) for name, each in model.named_modules()} == attributes
    assert {name: type(each) for name, each in model.named_modules()} == inner
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def layer(model, block=1, number=0):
    return model.blocks[block].attn_blocks[number]


STRUCTURES = {}


def structure(message):
    def keep(change):
        STRUCTURES[change.__name__] = (change, message)
        return change

    return keep


@structure("the model has no `blocks`, a ModuleList; a wrapped model must be unwrapped first")
def wrapped(model):
    return nn.Sequential(model)


@structure("a Module has no reverse")
def no_reverse(model):
    bare = nn.Module()
    bare.blocks = model.blocks
    return bare


@structure("the model has a reverse of its own, as an attribute of the instance")
def reverse_of_the_instance(model):
    model.reverse = lambda x: x


@structure("the model has a parameter 'scale' of shape (2,), which a TarFlow has not")
def parameter_of_the_model(model):
    model.scale = nn.Parameter(torch.ones(2))


@structure("the model has a module 'decoder', a Linear, which a TarFlow has not")
def module_of_the_model(model):
    model.decoder = nn.Linear(2, 2)


@structure("var must have shape (16, 4), got (4,)")
def shape_of_var(model):
    model.var = torch.ones(4)


@structure("blocks.1 has a module 'condition', a Linear, which a TarFlow has not")
def condition_of_a_token(model):
    model.blocks[1].condition = nn.Linear(2, 64)


@structure("blocks.0 has a buffer 'mean' of shape (4,), which a TarFlow has not")
def standardized_tokens(model):
    model.blocks[0].register_buffer("mean", torch.zeros(4))


@structure("blocks.1 has no parameter pos_embed of shape (T, C)")
def no_positions(model):
    del model.blocks[1].pos_embed


@structure("blocks.1 has no module 'attn_blocks'")
def no_layers(model):
    del model.blocks[1].attn_blocks


@structure("blocks.1 keeps its pos_embed elsewhere than in its parameters")
def positions_in_an_attribute(model):
    pos_embed = model.blocks[1].pos_embed.detach()
    del model.blocks[1].pos_embed
    model.blocks[1].pos_embed = pos_embed


@structure("blocks.0 has no attribute that permutes tokens when called with (tokens, dim=1, inverse=False)")
def no_permutation(model):
    del model.blocks[0].permutation


@structure("blocks.0 has several attributes that permute tokens: other, permutation")
def two_permutations(model):
    model.blocks[0].other = strangers.PermutationRoll(1)


@structure("blocks.0.permutation has a buffer 'index' of shape (16,), which a TarFlow has not")
def permutation_with_a_buffer(model):
    model.blocks[0].permutation.register_buffer("index", torch.arange(16))


@structure("blocks.1 has layers_per_block 1, and blocks.0 has 2")
def other_depth(model):
    del model.blocks[1].attn_blocks[1]


@structure(
    "blocks.0.proj_out must give 8 for nvp=True, or 4 for nvp=False, for tokens of size 4; it gives 8, nvp=False"
)
def another_nvp(model):
    model.blocks[0].nvp = False


@structure(
    "blocks.0.proj_out must give 8 for nvp=True, or 4 for nvp=False, for tokens of size 4; it gives 12, nvp=True"
)
def mixture(model):
    model.blocks[0].proj_out = nn.Linear(64, 12)


@structure("blocks.1.attn_blocks.0.attention.qkv.weight must have shape (192, 64), got (128, 64)")
def grouped_queries(model):
    layer(model).attention.qkv = nn.Linear(64, 128)


@structure("blocks.0.class_embed must have shape (3, 1, 64), got (3, 16, 64)")
def class_of_a_token(model):
    model.blocks[0].class_embed = nn.Parameter(torch.zeros(3, 16, 64))


@structure("blocks.1.attn_blocks.0.attention has a module 'q_norm', a LayerNorm, which a TarFlow has not")
def normed_queries(model):
    layer(model).attention.q_norm = nn.LayerNorm(64)


@structure("blocks.1.attn_blocks.0.attention.norm must be a LayerNorm, got a RMSNorm")
def rms_norm(model):
    layer(model).attention.norm = nn.RMSNorm(64)


@structure("blocks.1.attn_blocks.0.mlp.norm has no weight")
def norm_without_weight(model):
    layer(model).mlp.norm = nn.LayerNorm(64, elementwise_affine=False)


@structure(
    "blocks.1.attn_blocks.0.attention must tell its head size by one of head_channels, head_dim, head_size, "
    "num_heads, n_heads, got {}"
)
def no_head_size(model):
    del layer(model).attention.head_channels, layer(model).attention.num_heads


@structure("blocks.1.attn_blocks.1 has (head size, hidden size) (32, 256), the first (64, 256)")
def two_head_sizes(model):
    layer(model, number=1).attention.head_channels = 32
    layer(model, number=1).attention.num_heads = 2


@structure("blocks.0 has 64 channels, no multiple of the head size 48")
def odd_head_size(model):
    for each in model.blocks[0].attn_blocks:
        each.attention.head_channels = 48
        del each.attention.num_heads


@structure("blocks.0 has MLPs of hidden size 100, no multiple of 64 channels")
def odd_hidden_size(model):
    for each in model.blocks[0].attn_blocks:
        each.mlp.main = nn.Sequential(nn.Linear(64, 100), nn.GELU(), nn.Linear(100, 64))


@structure("blocks.1.attn_blocks.0.mlp.main.1 must be the exact GELU, got approximate='tanh'")
def tanh_gelu(model):
    layer(model).mlp.main[1] = nn.GELU("tanh")


@structure("blocks.1.attn_blocks.0.mlp.main must be Linear, GELU, Linear, got Linear, SiLU, Linear")
def silu(model):
    layer(model).mlp.main[1] = nn.SiLU()


@structure("blocks.1.attn_blocks.0.mlp.main must be a Sequential, got a Linear")
def no_mlp(model):
    layer(model).mlp.main = nn.Linear(64, 64)


@structure("blocks.1.attn_blocks.0.mlp.main.2 drops out with p = 0.1 in training mode; call eval() first")
def dropout(model):
    layer(model).mlp.main.insert(2, nn.Dropout(0.1).train())


@structure("blocks.1.attn_blocks.0.attention.proj must be a Linear, got a NonDynamicallyQuantizableLinear")
def subclassed_layer(model):
    layer(model).attention.proj = nn.modules.linear.NonDynamicallyQuantizableLinear(64, 64)


@structure("blocks.1.attn_blocks.0.attention.proj must be a Linear, got a ParametrizedLinear")
def parametrized_layer(model):
    parametrizations.weight_norm(layer(model).attention.proj)


@structure("blocks.1.attn_blocks.0.attention.proj has hooks")
def hooked_layer(model):
    layer(model).attention.proj.register_forward_pre_hook(lambda module, inputs: None)


@structure("blocks.1 has hooks")
def hooked_block(model):
    model.blocks[1].register_forward_hook(lambda module, inputs, output: None)


@structure("blocks.0.proj_in has a forward of its own, as an attribute of the instance")
def forward_of_the_instance(model):
    model.blocks[0].proj_in.forward = lambda h: h


@structure("blocks.0 has its parameters on the meta device; load its weights first")
def meta_device(model):
    with torch.device("meta"):
        return strangers.Model(1, 8, 2, 64, 1, 1)


@pytest.mark.parametrize("name", STRUCTURES)
def test_another_structure(name):
    change, message = STRUCTURES[name]
    model = strangers.images()
    changed = change(model)
    if name == "meta_device":
        with pytest.raises(ValueError, match=f"^apply_to: {re.escape(message)}$"):
            apply_to(changed)
    else:
        refused(model if changed is None else changed, re.escape(message))


def test_hooks_of_every_module():
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: None)
    try:
        refused(strangers.images(), "hooks are registered for every module")
    finally:
        handle.remove()


def test_the_reference_has_no_permutation():
    refused(ReferenceTarFlow(1, 8, 2, 64, 2, 1), "blocks.0 has no attribute that permutes tokens .*")
