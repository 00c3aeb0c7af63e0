"""Small flows with drawn weights. At the start values proj_out is zero: such a flow is a shift and proves nothing."""

import torch

from tarflow_fast import ReferenceTarFlow, TarFlow


def random_flow(seed=0, dtype=torch.float32, kind=TarFlow, scale=0.05, **config):
    """A flow with every parameter drawn. scale is the size of its log-scales and shifts."""
    config = {
        "in_channels": 1,
        "img_size": 8,
        "patch_size": 2,
        "channels": 64,
        "num_blocks": 2,
        "layers_per_block": 1,
    } | config
    return draw_parameters(kind(**config), seed, scale).to(dtype).eval()


def draw_parameters(model, seed=0, scale=0.05):
    """Draws every parameter of the model and the variance of its prior, and returns the model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            draw = torch.randn(parameter.shape, generator=generator)
            if "norm.weight" in name:
                parameter.copy_(1 + 0.2 * draw)
            elif "proj_out" in name:
                parameter.copy_(scale * draw / parameter.shape[-1] ** 0.5)
            elif parameter.ndim == 2 and "embed" not in name:
                parameter.copy_(draw / parameter.shape[-1] ** 0.5)
            else:
                parameter.copy_(0.2 * draw)
        model.var.copy_(torch.rand(model.var.shape, generator=generator) + 0.5)
    return model


def twin(model, dtype=torch.float64):
    """The reference model with the same weights."""
    reference = ReferenceTarFlow(**model.config)
    reference.load_state_dict({key: value.float() for key, value in model.state_dict().items()})
    return reference.to(dtype).eval()


def random_images(model, B=2, seed=1, dtype=None):
    generator = torch.Generator().manual_seed(seed)
    height, width = (side * model.patch_size for side in model.grid)
    return torch.randn(B, model.in_channels, height, width, generator=generator).to(dtype or model.var.dtype)


def random_noise(model, B=2, seed=2, dtype=None):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, *model.var.shape, generator=generator).to(dtype or model.var.dtype)
