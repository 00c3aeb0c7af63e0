"""The probe of `apply_to` refuses models whose modules are the same but whose code computes something else.

It also refuses them when their weights still have their start values.
"""

import contextlib

import pytest
import strangers
import torch
from test_apply_structure import layer, refused
from torch.nn import functional as F

from tarflow_fast import apply_to

pytestmark = pytest.mark.usefixtures("fresh_warnings")


class ClippedBlock(strangers.MetaBlock):
    def split(self, h):
        a, b = super().split(h)
        return 4 * torch.tanh(a / 4), b


class UnscaledBlock(strangers.MetaBlock):
    def split(self, h):
        return super().split(F.layer_norm(h, h.shape[-1:]))


class LastClassBlock(strangers.MetaBlock):
    def forward(self, x, y=None):
        return super().forward(x, None if y is None else y % len(self.class_embed))


class UnshiftedBlock(strangers.MetaBlock):
    def forward(self, x, y=None):
        return super().forward(x, y)[0]


class SignedBlock(strangers.MetaBlock):
    def forward(self, x, y=None):
        z, logdet = super().forward(x, y)
        return z, -logdet


class FailingBlock(strangers.MetaBlock):
    def forward(self, x, y=None):
        raise NotImplementedError("on a GPU only")


DIFFERS = r"differs from that of a TarFlow by [\d.e+-]+, with drawn weights in float32"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (ClippedBlock, f"blocks.1.forward, z {DIFFERS}"),
        (UnscaledBlock, f"blocks.1.forward, z {DIFFERS}"),
        (LastClassBlock, f"blocks.1.forward, z {DIFFERS}"),
        (SignedBlock, f"blocks.1.forward, log_det {DIFFERS}"),
        (UnshiftedBlock, r"blocks.1.forward must return z and log_det, got a Tensor"),
        (FailingBlock, r"blocks.1.forward fails on a CPU in float32: NotImplementedError: on a GPU only"),
    ],
)
@pytest.mark.parametrize("fresh", [False, True])
def test_a_block_that_computes_something_else(kind, message, fresh):
    model = strangers.Model(1, 8, 2, 64, 2, 2, num_classes=3) if fresh else strangers.images()
    model.blocks[1].__class__ = kind
    refused(model, message)


class SwishMLP(strangers.MLP):
    def forward(self, h):
        return self.main[2](F.gelu(self.main[0](self.norm(h)), approximate="tanh"))


class ParallelLayer(strangers.AttentionBlock):
    def forward(self, h, mask=None, temperature=1.0, cache=None):
        return h + self.attention(h, mask, temperature, cache) + self.mlp(h)


class SmallScaleAttention(strangers.Attention):
    def forward(self, h, mask=None, temperature=1.0, cache=None):
        return super().forward(h, mask, 1.01 * temperature, cache)


def test_a_layer_that_computes_something_else():
    for path, kind in (("", ParallelLayer), ("mlp", SwishMLP), ("attention", SmallScaleAttention)):
        model = strangers.images()
        layer(model, 0, 1).get_submodule(path).__class__ = kind
        refused(model, f"blocks.0.forward, z {DIFFERS}")


class Unscaled(strangers.Model):
    def reverse(self, x, y=None, **options):
        return super().reverse(x / self.var.sqrt(), y, **options)


class Clamped(strangers.Model):
    def reverse(self, x, y=None):
        return super().reverse(x, y).clamp(-3, 3)


class LinearScale(strangers.Model):
    """A model whose guidance is annealed over T tokens instead of T - 1."""

    def reverse(self, x, y=None, guidance=0, attn_temp=1.0, annealed_guidance=False, return_sequence=False):
        guidance = guidance * (x.size(1) - 1) / x.size(1) if annealed_guidance else guidance
        return super().reverse(x, y, guidance, "ab", attn_temp, annealed_guidance, return_sequence)


class Finished(strangers.Model):
    def reverse(self, x, y=None, return_sequence=False):
        return super().reverse(x, y, return_sequence=return_sequence)[-1:]


class Paired(strangers.Model):
    def reverse(self, x, y=None):
        return super().reverse(x, y), None


class Conditional(strangers.Model):
    def reverse(self, x, condition, y=None):
        return super().reverse(x + condition, y)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Unscaled, f"reverse {DIFFERS}"),
        (Clamped, f"reverse {DIFFERS}"),
        (LinearScale, f"reverse, result 1 {DIFFERS}"),
        (Finished, r"reverse must be a tensor of shape \(2, 1, 8, 8\), got one of \(1, 1, 8, 8\)"),
        (Paired, r"reverse must be a tensor of shape \(2, 1, 8, 8\), got a tuple"),
        (Conditional, "reverse needs an argument 'condition', which is not known"),
    ],
)
def test_a_reverse_that_computes_something_else(kind, message):
    model = strangers.images()
    model.__class__ = kind
    refused(model, message)


class MeanTokens(strangers.TarFlow):
    def reverse(self, z):
        x, log_det = super().reverse(z)
        return x, log_det / x[0].numel()


class BareTokens(strangers.TarFlow):
    def reverse(self, z):
        return super().reverse(z)[0]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (MeanTokens, f"reverse, result 1 {DIFFERS}"),
        (BareTokens, "reverse must return a tuple of 2, got a Tensor"),
    ],
)
def test_tokens_with_another_log_determinant(kind, message):
    model = strangers.tokens()
    model.__class__ = kind
    refused(model, message)


@contextlib.contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "context",
    [
        lambda: torch.autocast("cpu", torch.bfloat16),
        torch.inference_mode,
        lambda: torch.device("meta"),
        lambda: default_dtype(torch.float64),
    ],
    ids=["autocast", "inference", "device", "dtype"],
)
def test_the_probe_looks_past_what_the_caller_turned_on(context):
    model = strangers.images()
    with context():
        apply_to(model)
    z = torch.randn(3, 16, 4)
    with torch.no_grad():
        plain = strangers.Model.reverse(model, z.clone())
    torch.testing.assert_close(model.reverse(z), plain, rtol=1e-4, atol=1e-5)
