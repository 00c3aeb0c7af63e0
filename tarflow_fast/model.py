"""TarFlow: the drop-in model. Images on top of `TokenFlow`, with the original's signature, keys and means."""

from __future__ import annotations

import torch
from torch import Tensor

from tarflow_fast.checkpoint import ImageCheckpointMixin
from tarflow_fast.config import TarFlowConfig
from tarflow_fast.flow import TokenFlow
from tarflow_fast.solvers import Report, Solving
from tarflow_fast.solvers.nonfinite import NonFinite
from tarflow_fast.transforms import Transform
from tarflow_fast.validate import check_labels, check_tensor

__all__ = ["Model", "TarFlow"]


class TarFlow(ImageCheckpointMixin, TokenFlow):
    """A stack of autoregressive transformer flows on image patches (TarFlow, arXiv 2412.06329).

    K flow blocks map image tokens x to noise z; odd blocks see the tokens in reverse order; the prior is N(0, var).
    Parameters, buffers, state_dict keys and results are those of the original implementation.

    Args:
        in_channels: channels of the image.
        img_size: side of the image in pixels, or (height, width); a multiple of patch_size.
        patch_size: side of a patch. T = (height / patch_size) (width / patch_size), D = in_channels * patch_size**2.
        channels: width C of the transformers, a multiple of 64 (the head size).
        num_blocks: K.
        layers_per_block: L.
        nvp: False drops the log-scale (volume preserving); the prior's variance is then learned by `update_prior`.
        num_classes: 0 for an unconditional flow.
        transform: as in `TokenFlow`: 'affine', 'shift' or 'logistic_mixture', or an object.
        backend: 'auto', 'torch', 'cpu', 'triton' or 'cuda': which kernels to use. One asked for by name that cannot run
            raises when it is used; 'auto' follows TARFLOW_FAST_BACKEND, then what is there.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, not positive, or does not divide as it must.
    """

    def __init__(
        self,
        in_channels: int,
        img_size: int | tuple[int, int],
        patch_size: int,
        channels: int,
        num_blocks: int,
        layers_per_block: int,
        nvp: bool = True,
        num_classes: int = 0,
        *,
        transform: str | Transform | None = None,
        backend: str = "auto",
    ) -> None:
        config = TarFlowConfig(
            in_channels, img_size, patch_size, channels, num_blocks, layers_per_block, nvp, num_classes, transform
        ).checked("TarFlow")
        self._build(config.tokens.checked("TarFlow"), backend)
        self._config = config
        self.in_channels, self.patch_size = config.in_channels, config.patch_size
        self.img_size, self.grid = config.img_size, config.grid

    def _check_input(self, where: str, x: object, y: object) -> Tensor | None:
        height, width = (side * self.patch_size for side in self.grid)
        check_tensor(where, "x", x, ("B", self.in_channels, height, width), self.var)
        return check_labels(where, y, x.size(0), self.num_classes, self.var)

    def patchify(self, x: Tensor) -> Tensor:
        """Images (B, in_channels, height, width) -> tokens (B, T, D); each a patch (channel, row, column)."""
        B, (rows, columns), p = x.size(0), self.grid, self.patch_size
        patches = x.reshape(B, self.in_channels, rows, p, columns, p)
        return patches.permute(0, 2, 4, 1, 3, 5).reshape(B, self.num_tokens, self.token_size)

    def unpatchify(self, z: Tensor) -> Tensor:
        """Tokens (B, T, D) -> images (B, in_channels, height, width)."""
        B, (rows, columns), p = z.size(0), self.grid, self.patch_size
        patches = z.reshape(B, rows, columns, self.in_channels, p, p)
        return patches.permute(0, 3, 1, 4, 2, 5).reshape(B, self.in_channels, rows * p, columns * p)

    _to_tokens, _from_tokens = patchify, unpatchify

    def forward(self, x: Tensor, y: Tensor | int | None = None) -> tuple[Tensor, list[Tensor], Tensor]:
        """Images to noise: x -> z = f_K(... f_1(x)), with its log-determinant.

        Args:
            x: (B, in_channels, height, width) images, by custom in [-1, 1]; the parameters' dtype, under autocast any
                of float32, bfloat16 and float16.
            y: (B,) integer labels, negative for "no label" (the mean class embedding); an int for all images; None for
                no labels at all. An unconditional flow takes no notice of them.

        Returns:
            z (B, T, D); outputs, the K tensors (B, T, D) after each block, z the last; and logdets (B,), float32
            (float64 for a float64 model): log |det dz/dx| divided by T * D, summed over blocks.

        Raises:
            TypeError, ValueError: x or y of the wrong shape, dtype or device; a label not below num_classes.
        """
        y = self._check_input("forward", x, y)
        tokens, outputs = self.patchify(x), []
        logdets = torch.zeros((), device=x.device)
        for block in self.blocks:
            tokens, logdet = block(tokens, y, backend=self.backend)
            logdets = logdets + logdet
            outputs.append(tokens)
        return tokens, outputs, logdets

    def get_loss(self, z: Tensor, logdets: Tensor) -> Tensor:
        """Negative log-likelihood under N(0, 1) per dimension, less its constant: 0.5 mean(z^2) - mean(logdets)."""
        return 0.5 * z.pow(2).mean() - logdets.mean()

    def reverse(
        self,
        x: Tensor,
        y: Tensor | int | None = None,
        guidance: float = 0,
        guide_what: str = "ab",
        attn_temp: float = 1.0,
        annealed_guidance: bool = False,
        return_sequence: bool = False,
        *,
        return_log_det: bool = False,
        differentiable: bool = False,
        nonfinite: str = "warn",
        progress: bool = False,
        precision: str | None = None,
        memory_limit: int | None = None,
        solver: str = "auto",
        tolerance: float | None = None,
        window: int | None = None,
        draft: str | None = None,
        return_report: bool = False,
    ) -> Tensor | list[Tensor] | tuple[Tensor | list[Tensor] | Report, ...]:
        """Noise to images, the inverse of `forward`, blocks last to first, in a block one token after another or by
        windows.

        Args:
            x: (B, T, D) standard normal noise; it is scaled by sqrt(var) inside, and never written.
            y: (B,) integer labels, negative for "no label"; an int for all rows; None for the mean class embedding.
            guidance: weight g >= 0 of a = a_c + g (a_c - a_u), b likewise; the unguided pass u sees no label.
            guide_what: 'a', 'b' or 'ab': what guidance acts on.
            attn_temp: temperature of the attention logits of the unguided pass, > 0; guides flows without labels.
            annealed_guidance: let g grow over the tokens, g (i + 1) / (T - 1).
            return_sequence: return all K + 1 stages, noise first, instead of the images alone.
            return_log_det: return a pair, the second log |det d images / d x| (B,): nats, summed over all dimensions,
                the scale sqrt(var) included; float32 (float64 for a float64 model).
            differentiable: keep an autograd graph; without it the result carries no gradient.
            nonfinite: what to do when a row overflows: 'warn' (and return it), 'raise' NonFiniteError, or 'ignore'.
            progress: show a progress bar over all tokens of all blocks.
            precision: 'fp32', 'bf16' or 'int8' (native CPU engine only), where an engine computes in it; None: that of
                the parameters, bf16 under autocast(bfloat16).
            memory_limit: bytes the engine may take, CPU or GPU, all of what a frozen model keeps included (a larger
                batch is inverted in parts, with the same bits); None: most of what the machine has left.
            solver, tolerance, window, draft: as in `inverse`.
            return_report: append a `Report` to what is returned: passes, tokens accepted, fallbacks, residuals.

        Returns:
            Images (B, in_channels, height, width) in the dtype of x (of the parameters, where x is narrower under
            autocast), or a list of K + 1 of them.

        Raises:
            TypeError, ValueError: an argument of the wrong type, shape, dtype, device or range.
            NonFiniteError: see `nonfinite`.
            RuntimeError: a backend or precision asked for by name cannot run; a frozen model was changed.
            MemoryError: one row alone needs more than `memory_limit`.
        """
        check_tensor("reverse", "x", x, ("B", *self.var.shape), self.var, scaled=True)
        y = check_labels("reverse", y, x.size(0), self.num_classes, self.var)
        guide = self._guidance("reverse", guidance, guide_what, attn_temp, annealed_guidance)
        bad = NonFinite("reverse", nonfinite, x.size(0))
        solving = Solving("reverse", solver, tolerance, window, differentiable, draft)
        with (
            torch.set_grad_enabled(differentiable and torch.is_grad_enabled()),
            self._call("reverse", precision, differentiable, memory_limit, solving) as call,
            self._progress("reverse", 1 if progress else 0) as on_token,
        ):
            stages, log_det = self._invert(x * self.var.sqrt(), y, guide, call, bad, on_token)
            bad.warn()
            if return_sequence:
                images = [self.unpatchify(stage) for stage in (x.clone(), *stages[1:])]
            else:
                images = self.unpatchify(stages[-1])
            results = [images]
            if return_log_det:
                results.append(log_det + 0.5 * self.var.to(log_det).log().sum())
            if return_report:
                results.append(solving.report)
            return images if len(results) == 1 else tuple(results)


Model = TarFlow
