"""What a flow knows about data: log-likelihood, bits per dimension, denoising by the score, classes by Bayes' rule."""

from __future__ import annotations

import copy
import math
from itertools import chain
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from tarflow_fast.dtypes import wide_dtype
from tarflow_fast.engines.call import Call
from tarflow_fast.solvers.density import density_paths, encode_all
from tarflow_fast.solvers.nonfinite import NonFinite, bad_rows
from tarflow_fast.validate import check_number, check_positive_int, seeded

if TYPE_CHECKING:
    from tarflow_fast.data import Dequantizer

# Values saved for backward, per token, layer and channel: two LayerNorm inputs and outputs (4), qkv (3), attention's
# output twice (2), fc1's output before and after GELU (8), the residual sums (2).
_SAVED_VALUES = 19


Flow = TypeVar("Flow", bound=nn.Module)


class LikelihoodMixin:
    """Methods of `TokenFlow` and `TarFlow`: x is tokens (B, T, D) of the one, images of the other."""

    def log_prob(
        self,
        x: Tensor,
        y: Tensor | int | None = None,
        *,
        precision: str | None = None,
        memory_limit: int | None = None,
    ) -> Tensor:
        """log p(x | y) = log N(z; 0, var) + log |det dz/dx|, in nats, summed over all dimensions.

        Without gradients (under torch.no_grad()) the native engine computes it on the CPU.

        Args:
            x: (B, T, D), or of a TarFlow (B, in_channels, height, width); the parameters' dtype.
            y: (B,) integer labels, negative for none; an int for all images; or None.
            precision: 'fp32', 'bf16' or 'int8' (native CPU engine only), without gradients; None: that of the
                parameters, bf16 under autocast(bfloat16).
            memory_limit: bytes the engine may take; None: most of what the machine has left.

        Returns:
            (B,), float32 (float64 for a float64 model); differentiable in x and the parameters.

        Raises:
            TypeError, ValueError: as `forward`.
        """
        y = self._check_input("log_prob", x, y)
        with self._call("log_prob", precision, False, memory_limit) as call:
            return self._density(self._to_tokens(x), y, call)

    def _density(self, tokens: Tensor, y: Tensor | None, call: Call) -> Tensor:
        """log p of tokens (B, T, D), by the net's modules, or by an engine where no gradient is asked for."""
        if torch.is_grad_enabled() and any(each.requires_grad for each in (tokens, *self.parameters())):
            if call.precision is not None:
                raise ValueError(
                    f"{call.where}: precision must be None where gradients are kept (torch.no_grad() keeps none), "
                    f"got {call.precision!r}"
                )
            paths = []
        else:
            paths = density_paths(self.bijections, tokens, call)
        if not paths:
            z, log_det = self._encode(tokens, y)
            return self._log_prior(z) + log_det
        stages, log_det = encode_all(self.bijections, tokens, y, call, paths)
        return self._log_prior(stages[-1]) + log_det

    def _log_prior(self, z: Tensor) -> Tensor:
        """log N(z; 0, var) of tokens (B, T, D): (B,), float32 or wider."""
        wide = wide_dtype(z)
        z, var = z.to(wide), self.var.to(wide)
        return -0.5 * (z.square() / var + torch.log(2 * math.pi * var)).sum(dim=(1, 2))

    @torch.no_grad()
    def bits_per_dim(
        self,
        x: Tensor,
        y: Tensor | int | None = None,
        *,
        levels: int = 256,
        n_draws: int = 1,
        seed: int | None = None,
        batch_size: int = 256,
        dequantizer: Dequantizer | None = None,
        importance: int = 1,
    ) -> Tensor:
        """Bits per subpixel of integer images under dequantisation, an upper bound on the exact code length:

            -mean over draws of log2 p((x + u) / levels * 2 - 1) / dims + log2(levels / 2),   u uniform in [0, 1)

        With a dequantizer, u is drawn from its density q(u | x), and log2 q / dims is added (Flow++, arXiv 1902.00275,
        section 3.1). With importance k, log2 of the mean of p / q over k draws stands in each draw's place: a tighter
        bound, the exact length for k to infinity (importance weighting, arXiv 1509.00519).

        Args:
            x: (B, in_channels, height, width) integers in [0, levels), uint8 for 8-bit images.
            y: (B,) labels, an int for all images, or None.
            levels: grey levels of the data (256 for 8-bit images).
            n_draws: dequantisation draws to average over.
            seed: of the draws, made on the CPU; None for the global generator.
            batch_size: images evaluated together.
            dequantizer: of `tarflow_fast.data`, for images of this flow; None: uniform noise.
            importance: k, so that n_draws * k densities are computed for an image.

        Returns:
            (B,) float64, on the CPU.

        Raises:
            TypeError, ValueError: x not of an integer dtype or outside [0, levels); a dequantizer that is none, or for
                other images; otherwise as `forward`.
        """
        check_positive_int("bits_per_dim", "levels", levels, 2)
        check_positive_int("bits_per_dim", "n_draws", n_draws)
        check_positive_int("bits_per_dim", "batch_size", batch_size)
        check_positive_int("bits_per_dim", "importance", importance)
        if dequantizer is not None and not callable(dequantizer):
            got = type(dequantizer).__name__
            raise TypeError(f"bits_per_dim: dequantizer must be one of tarflow_fast.data, or None, got {got}")
        if not isinstance(x, Tensor) or x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"bits_per_dim: x must be a tensor of integers in [0, {levels}), got {got}")
        if x.numel() and (int(x.min()) < 0 or int(x.max()) >= levels):
            raise ValueError(f"bits_per_dim: x must be in [0, {levels}), got [{int(x.min())}, {int(x.max())}]")
        y = self._check_input("bits_per_dim", x.to(self.var), y)
        generator = None if seed is None else seeded("bits_per_dim", seed)
        dims = self.num_tokens * self.token_size
        total = torch.zeros(len(x), dtype=torch.float64)
        for _ in range(n_draws):
            for start in range(0, len(x), batch_size):
                rows = slice(start, start + batch_size)
                log_ratios = []  # log p / q
                for _ in range(importance):
                    u = torch.rand(x[rows].shape, generator=generator, dtype=torch.float32, device="cpu").to(x.device)
                    log_q = 0.0
                    if dequantizer is not None:
                        u, log_q = dequantizer(x[rows], u, levels)
                        log_q = log_q.double().cpu()
                    images = ((x[rows] + u) / levels * 2 - 1).to(self.var)
                    log_ratios.append(self.log_prob(images, None if y is None else y[rows]).double().cpu() - log_q)
                total[rows] += torch.logsumexp(torch.stack(log_ratios), dim=0) - math.log(importance)
        return -total / n_draws / dims / math.log(2) + math.log2(levels / 2)

    def denoise(
        self,
        x: Tensor,
        y: Tensor | int | None = None,
        noise_std: float = 0.05,
        *,
        batch_size: int | None = None,
        memory_limit: int = 2**31,
        nonfinite: str = "warn",
    ) -> Tensor:
        """Remove the noise the flow was trained with, by Tweedie's formula: x + noise_std^2 * grad_x log p(x | y).

        Args:
            x: (B, in_channels, height, width) noisy images, as `sample` draws them.
            y: (B,) labels, an int for all images, or None.
            noise_std: standard deviation of the training noise (arXiv 2412.06329, section 2.4), in units of x; > 0.
            batch_size: images differentiated together; None: as many as fit memory_limit, at least one.
            memory_limit: bytes of saved activations to stay within.
            nonfinite: what to do when a row of the result is not finite: 'warn' (and return it), 'raise'
                NonFiniteError, or 'ignore'.

        Returns:
            Denoised images, shaped and typed as x, without gradient.

        Raises:
            TypeError, ValueError: as `forward`; noise_std, batch_size or memory_limit not positive.
            NonFiniteError: see `nonfinite`.
        """
        noise_std = check_number("denoise", "noise_std", noise_std)
        if not (math.isfinite(noise_std) and noise_std > 0):
            raise ValueError(f"denoise: noise_std must be finite and > 0, got {noise_std}")
        check_positive_int("denoise", "memory_limit", memory_limit)
        if batch_size is None:
            layers = len(self.blocks) * self.layers_per_block
            row_bytes = layers * self.num_tokens * self.channels * _SAVED_VALUES * self.var.element_size()
            batch_size = max(1, memory_limit // row_bytes)
        check_positive_int("denoise", "batch_size", batch_size)
        y = self._check_input("denoise", x, y)
        bad = NonFinite("denoise", nonfinite, len(x))
        with torch.inference_mode(False), torch.enable_grad():
            flow = _differentiable(self)
            clean = torch.empty_like(x, memory_format=torch.contiguous_format)
            for start in range(0, len(x), batch_size):
                rows = slice(start, start + batch_size)
                noisy = x[rows].detach().clone().requires_grad_()  # a clone: x may be an inference tensor
                log_prob = flow.log_prob(noisy, None if y is None else y[rows])
                (score,) = torch.autograd.grad(log_prob.sum(), noisy)
                clean[rows] = (noisy + noise_std**2 * score).detach()
                if bad.in_part(clean[rows]):
                    row = start + int(bad_rows(clean[rows]).nonzero()[0])
                    bad.at(f"first row {row}; the image given, or the score there, is not finite")
        bad.warn()
        return clean

    @torch.no_grad()
    def classify(self, x: Tensor) -> Tensor:
        """Classes by Bayes' rule under equal priors: log p(class | x) = log_softmax over classes of log p(x | class).

        Args:
            x: (B, in_channels, height, width).

        Returns:
            (B, num_classes) log-probabilities, float32 or float64.

        Raises:
            ValueError: the flow is unconditional; otherwise as `forward`.
        """
        if not self.num_classes:
            raise ValueError("classify: needs a class-conditional flow, got num_classes = 0")
        self._check_input("classify", x, None)
        labels = torch.arange(self.num_classes, device=x.device)
        scores = [self.log_prob(x, label.expand(len(x))) for label in labels]
        return torch.log_softmax(torch.stack(scores, dim=1), dim=1)


def _differentiable(flow: Flow) -> Flow:
    """The flow, or a copy of it where it was made under torch.inference_mode: autograd may not look at such tensors."""
    made_there = any(tensor.is_inference() for tensor in chain(flow.parameters(), flow.buffers()))
    return copy.deepcopy(flow) if made_there else flow
