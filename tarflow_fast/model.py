"""TarFlow: the drop-in model. Parameters, state_dict, forward, reverse and sample; likelihoods are in likelihood.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tarflow_fast.block import HEAD_SIZE, MetaBlock
from tarflow_fast.checkpoint import CheckpointMixin
from tarflow_fast.inverse import FrozenBlocks, Guidance, InverseCall, invert_block
from tarflow_fast.likelihood import LikelihoodMixin
from tarflow_fast.nonfinite import NonFinite, first_overflow
from tarflow_fast.ops.registry import BACKENDS, warn_once
from tarflow_fast.validate import check_labels, check_positive_int, check_tensor, seeded

if TYPE_CHECKING:
    from typing_extensions import Self


class TarFlow(LikelihoodMixin, CheckpointMixin, nn.Module):
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
        backend: 'auto', 'torch', 'cpu', 'triton' or 'cuda': which kernels to use. One asked for by name that cannot run
            raises when it is used; 'auto' follows TARFLOW_FAST_BACKEND, then what is there.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, not positive, or does not divide as it must.
    """

    _frozen: FrozenBlocks | None = None

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
        backend: str = "auto",
    ) -> None:
        super().__init__()
        pair = isinstance(img_size, (tuple, list)) and len(img_size) == 2
        height, width = img_size if pair else (img_size, img_size)
        in_channels, height, width, patch_size, channels, num_blocks, layers_per_block, num_classes = (
            check_positive_int("TarFlow", name, value, 0 if name == "num_classes" else 1)
            for name, value in (
                ("in_channels", in_channels),
                ("img_size", height),
                ("img_size", width),
                ("patch_size", patch_size),
                ("channels", channels),
                ("num_blocks", num_blocks),
                ("layers_per_block", layers_per_block),
                ("num_classes", num_classes),
            )
        )
        if height % patch_size or width % patch_size:
            raise ValueError(f"TarFlow: img_size must be a multiple of patch_size = {patch_size}, got {img_size}")
        if channels % HEAD_SIZE:
            raise ValueError(f"TarFlow: channels must be a multiple of {HEAD_SIZE}, got {channels}")
        self.in_channels, self.patch_size, self.channels = in_channels, patch_size, channels
        self.img_size = height if height == width else (height, width)
        self.layers_per_block, self.nvp, self.num_classes = layers_per_block, bool(nvp), num_classes
        self.grid = (height // patch_size, width // patch_size)
        self.num_tokens, self.token_size = self.grid[0] * self.grid[1], in_channels * patch_size**2
        self.backend = backend
        self.blocks = nn.ModuleList(
            MetaBlock(
                self.token_size,
                channels,
                self.num_tokens,
                flip=k % 2 == 1,
                num_layers=layers_per_block,
                nvp=self.nvp,
                num_classes=num_classes,
            )
            for k in range(num_blocks)
        )
        self.register_buffer("var", torch.ones(self.num_tokens, self.token_size))

    @property
    def backend(self) -> str:
        """The backend every op of this model is asked to use."""
        return self._backend

    @backend.setter
    def backend(self, name: str) -> None:
        if name not in BACKENDS:
            raise ValueError(f"TarFlow: backend must be one of {', '.join(BACKENDS)}, got {name!r}")
        self._backend = name

    @property
    def frozen(self) -> bool:
        """Whether `freeze` was called, and not `unfreeze` since."""
        return self._frozen is not None

    def freeze(self) -> Self:
        """Promise that weights and layers stay as they are: sampling on the CPU then packs its weights only once.

        Without it every call of `reverse` and `sample` looks at every layer and packs every weight for the native
        engine, so that neither can be out of date. With it they are packed at the first call in each precision, for
        the same bits. Memory: one more copy of the weights for each precision used, in that precision, until
        `unfreeze`. Gradients, `requires_grad` and other devices are not concerned; a deep copy or a pickle of the model
        is not frozen.

        A change after all is an error of the next call that would use what was kept: a module or a parameter was
        replaced, hooked, moved, or written as far as PyTorch counts writes. It does not count those through `.data`
        or NumPy, by optimizers with fused=True, or to tensors made in inference mode: `freeze` again after those.

        Returns:
            The model itself.

        Raises:
            RuntimeError: the native CPU engine cannot take a block (on another device, hooked, replaced), or is not
                there; the reason is named.
        """
        self._frozen = None  # should this raise, nothing old is left in use
        self._frozen = FrozenBlocks(self.blocks)
        return self

    def unfreeze(self) -> Self:
        """Take the promise of `freeze` back and let go of the packed weights."""
        self._frozen = None
        return self

    @property
    def config(self) -> dict[str, object]:
        """The constructor's arguments, as JSON can hold them; what `save_pretrained` writes."""
        return {
            "in_channels": self.in_channels,
            "img_size": self.img_size if isinstance(self.img_size, int) else list(self.img_size),
            "patch_size": self.patch_size,
            "channels": self.channels,
            "num_blocks": len(self.blocks),
            "layers_per_block": self.layers_per_block,
            "nvp": self.nvp,
            "num_classes": self.num_classes,
        }

    def _check_images(self, where: str, x: object, y: object) -> Tensor | None:
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
        y = self._check_images("forward", x, y)
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

    @torch.no_grad()
    def update_prior(self, z: Tensor) -> None:
        """Move the prior's variance a tenth of the way to the batch mean of z^2, z (B, T, D); for nvp=False."""
        check_tensor("update_prior", "z", z, ("B", *self.var.shape), self.var, scaled=True)
        if len(z) == 0:
            raise ValueError("update_prior: z must hold at least one row, got 0")
        self.var.lerp_(z.pow(2).mean(dim=0).to(self.var.dtype), 0.1)

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
        differentiable: bool = False,
        nonfinite: str = "warn",
        progress: bool = False,
        precision: str | None = None,
        memory_limit: int | None = None,
    ) -> Tensor | list[Tensor]:
        """Noise to images, the inverse of `forward`: tokens are solved one after another, blocks last to first.

        Args:
            x: (B, T, D) standard normal noise; it is scaled by sqrt(var) inside, and never written.
            y: (B,) integer labels, negative for "no label"; an int for all rows; None for the mean class embedding.
            guidance: weight g >= 0 of a = a_c + g (a_c - a_u), b likewise; the unguided pass u sees no label.
            guide_what: 'a', 'b' or 'ab': what guidance acts on.
            attn_temp: temperature of the attention logits of the unguided pass, > 0; guides flows without labels.
            annealed_guidance: let g grow over the tokens, g (i + 1) / (T - 1).
            return_sequence: return all K + 1 stages, noise first, instead of the images alone.
            differentiable: keep an autograd graph (memory grows with T^2); without it the result carries no gradient.
            nonfinite: what to do when a row overflows: 'warn' (and return it), 'raise' NonFiniteError, or 'ignore'.
            progress: show a progress bar over all tokens of all blocks.
            precision: 'fp32', 'bf16' or 'int8' (native CPU engine only), where an engine computes in it; None: that of
                the parameters, bf16 under autocast(bfloat16).
            memory_limit: bytes the engine may take, CPU or GPU, all of what a frozen model keeps included (a larger
                batch is inverted in parts, with the same bits); None: most of what the machine has left.

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
        guide = Guidance(guidance, guide_what, attn_temp, annealed_guidance)
        bad = NonFinite("reverse", nonfinite, x.size(0))
        with (
            torch.set_grad_enabled(differentiable and torch.is_grad_enabled()),
            InverseCall(self.backend, precision, differentiable, memory_limit, self.blocks, self._frozen) as call,
            self._progress("reverse", 1 if progress else 0) as on_token,
        ):
            stages = self._invert(x, y, guide, call, bad, on_token)
            bad.warn()
            if return_sequence:
                return [self.unpatchify(stage) for stage in (x.clone(), *stages[1:])]
            return self.unpatchify(stages[-1])

    def _invert(
        self,
        x: Tensor,
        y: Tensor | None,
        guide: Guidance,
        call: InverseCall,
        bad: NonFinite,
        on_token: Callable[[], None] | None,
    ) -> list[Tensor]:
        """The K + 1 stages (B, T, D) of the inverse of noise x, checked, x itself first; `bad` learns of overflows."""
        if idle := guide.why_idle(y is not None):
            warn_once(f"{guide.where}: {idle}")
        begin, stages, tokens = bad.seen, [x], x * self.var.sqrt()
        call.begin()
        for block in reversed(self.blocks):
            tokens, _ = invert_block(block, tokens, y, guide, call, on_token)
            stages.append(tokens)
        if bad.in_part(tokens):
            bad.at(first_overflow(stages, self.blocks, begin, guide.active))
        return stages

    @contextmanager
    def _progress(self, where: str, parts: int) -> Iterator[Callable[[], None] | None]:
        """What to call for every token solved in `parts` inverses one after another, for a progress bar; 0: no bar."""
        if not parts:
            yield None
            return
        from tqdm.auto import tqdm  # only here, so that a bare machine samples without it

        tokens = parts * len(self.blocks) * (self.num_tokens - 1)
        with tqdm(total=tokens, desc=where, unit="token", leave=False) as bar:
            yield bar.update

    def sample(
        self,
        n: int,
        y: Tensor | int | None = None,
        *,
        guidance: float = 0.0,
        guide_what: str = "ab",
        attn_temp: float = 1.0,
        annealed_guidance: bool = False,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        batch_size: int | None = None,
        return_sequence: bool = False,
        progress: bool = False,
        nonfinite: str = "warn",
        precision: str | None = None,
        memory_limit: int | None = None,
    ) -> Tensor | list[Tensor]:
        """Draw n images. The noise is made on the CPU in float32, so a seed means the same images on every device.

        Args:
            n: number of images.
            y: (n,) integer labels, or one label for all, or None.
            seed: seed of the noise; or pass a CPU `generator`; neither: the global CPU generator.
            batch_size: images inverted together; None for all at once. It does not change the noise.
            The rest as in `reverse`.

        Returns:
            (n, in_channels, height, width) images, or with return_sequence the list of K + 1 stages of them.

        Raises:
            TypeError, ValueError: as `reverse`; labels given to an unconditional flow; both seed and generator.
        """
        check_positive_int("sample", "n", n, 0)
        guide = Guidance(guidance, guide_what, attn_temp, annealed_guidance, where="sample")
        batch_size = max(n, 1) if batch_size is None else check_positive_int("sample", "batch_size", batch_size)
        if y is not None and not self.num_classes:
            raise ValueError("sample: y must be None for an unconditional flow (num_classes = 0), got labels")
        y = check_labels("sample", y, n, self.num_classes, self.var)
        if seed is not None:
            if generator is not None:
                raise ValueError("sample: pass seed or generator, got both")
            generator = seeded("sample", seed)
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"sample: generator must be a torch.Generator, got {type(generator).__name__}")
        noise = torch.randn(n, *self.var.shape, generator=generator, dtype=torch.float32, device="cpu").to(self.var)
        parts, starts, bad = [], range(0, max(n, 1), batch_size), NonFinite("sample", nonfinite, n)
        with (
            torch.no_grad(),
            InverseCall(
                self.backend, precision, False, memory_limit, self.blocks, self._frozen, where="sample"
            ) as call,
            self._progress("sample", len(starts) if progress else 0) as on_token,
        ):
            for start in starts:
                rows = slice(start, start + batch_size)
                stages = self._invert(noise[rows], None if y is None else y[rows], guide, call, bad, on_token)
                parts.append(stages if return_sequence else stages[-1:])
        bad.warn()
        images = [self.unpatchify(torch.cat(stage)) for stage in zip(*parts, strict=True)]
        return images if return_sequence else images[-1]

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.config.items())


Model = TarFlow
