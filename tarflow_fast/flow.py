"""TokenFlow: a stack of autoregressive flows on sequences of tokens (B, T, D); `TarFlow` puts images on top.

z = f_K(... f_1(x)),   log p(x) = log N(z; 0, var) + sum over blocks of log |det df/dx|     (arXiv 2412.06329, 2.1)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tarflow_fast.block import MetaBlock, check_transforms
from tarflow_fast.checkpoint import CheckpointMixin
from tarflow_fast.config import FlowConfig
from tarflow_fast.dtypes import wide_dtype
from tarflow_fast.engines.call import Call
from tarflow_fast.engines.frozen import FrozenNets
from tarflow_fast.likelihood import LikelihoodMixin
from tarflow_fast.net import HEAD_SIZE
from tarflow_fast.ops.registry import BACKENDS, warn_once
from tarflow_fast.sampling import SamplingMixin
from tarflow_fast.solvers import Report, Solving, invert_all
from tarflow_fast.solvers.nonfinite import NonFinite, first_overflow
from tarflow_fast.solvers.plan import SolverPlan
from tarflow_fast.solvers.report import TOLERANCE
from tarflow_fast.transforms import Bijection, Guidance, Transform
from tarflow_fast.validate import check_labels, check_number, check_positive_int, check_tensor

if TYPE_CHECKING:
    from typing_extensions import Self

    from tarflow_fast.solvers.calibrate import Calibration

__all__ = ["TokenFlow"]


class TokenFlow(SamplingMixin, LikelihoodMixin, CheckpointMixin, nn.Module):
    """A stack of K autoregressive transformer flows on T tokens of size D (TarFlow, arXiv 2412.06329, without images).

    Args:
        num_tokens: T.
        token_size: D.
        channels: width C of the transformers, a multiple of head_size.
        num_blocks: K.
        layers_per_block: L.
        head_size: E.
        expansion: width of the MLPs over C.
        nvp: False drops the log-scale (volume preserving); the prior's variance is then learned by `update_prior`.
        num_classes: 0 for an unconditional flow.
        orders: K permutations of range(T), in which the blocks see the tokens: orders[k][i] is the place of the i-th
            token that block k sees. None: as they are and in reverse, in turn.
        transform: what the parameters do to a token: 'affine', 'shift', 'logistic_mixture' or 'spline', the last two
            with a number of components after a colon where that is not 8; or an object (`LogisticMixture(4)`). None:
            'affine', or 'shift' where nvp is False. Every transform is the identity where its parameters are 0. At the
            start proj_out has weight 0 and torch's bias: then each block is a fixed map near the identity.
        backend: 'auto', 'torch', 'cpu', 'triton' or 'cuda': which kernels to use. One asked for by name that cannot run
            raises when it is used; 'auto' follows TARFLOW_FAST_BACKEND, then what is there.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, not positive, or does not divide as it must; orders are
            no permutations; there is no such transform, or nvp is False and it is not the shift.
    """

    _frozen: FrozenNets | None = None
    solver_plan: SolverPlan | None = (
        None  # where solver 'auto' takes windows: `calibrate` sets it, or the flow's folder
    )

    def __init__(
        self,
        num_tokens: int,
        token_size: int,
        channels: int,
        num_blocks: int,
        layers_per_block: int,
        *,
        head_size: int = HEAD_SIZE,
        expansion: int = 4,
        nvp: bool = True,
        num_classes: int = 0,
        orders: Sequence[Sequence[int]] | Tensor | None = None,
        transform: str | Transform | None = None,
        backend: str = "auto",
    ) -> None:
        sizes = num_tokens, token_size, channels, num_blocks, layers_per_block
        config = FlowConfig(*sizes, head_size, expansion, nvp, num_classes, orders, transform)
        self._build(config.checked(type(self).__name__), backend)

    def _build(self, config: FlowConfig, backend: str) -> None:
        super().__init__()
        self._config, self.backend = config, backend
        self.num_tokens, self.token_size, self.channels = config.num_tokens, config.token_size, config.channels
        self.layers_per_block, self.nvp, self.num_classes = config.layers_per_block, config.nvp, config.num_classes
        orders = config.orders or (None,) * config.num_blocks
        self.blocks = nn.ModuleList(
            MetaBlock(
                config.token_size, config.channels, config.num_tokens, k % 2 == 1, config.layers_per_block,
                config.head_size, config.expansion, config.nvp, config.num_classes, orders[k],
                config.transform,
            )
            for k in range(config.num_blocks)
        )  # fmt: skip
        self.register_load_state_dict_pre_hook(check_transforms)
        self.register_buffer("var", torch.ones(config.num_tokens, config.token_size))

    @property
    def backend(self) -> str:
        """The backend every op of this model is asked to use."""
        return self._backend

    @backend.setter
    def backend(self, name: str) -> None:
        if name not in BACKENDS:
            raise ValueError(f"{type(self).__name__}: backend must be one of {', '.join(BACKENDS)}, got {name!r}")
        self._backend = name

    @property
    def bijections(self) -> list[Bijection]:
        """What engines and solvers are given: net, transform and order of each block."""
        return [block.bijection for block in self.blocks]

    @property
    def frozen(self) -> bool:
        """Whether `freeze` was called, and not `unfreeze` since."""
        return self._frozen is not None

    def freeze(self) -> Self:
        """Promise that weights and layers stay as they are: sampling on the CPU then packs its weights only once.

        Without it every call of `inverse`, `reverse` and `sample` looks at every layer and packs every weight for the
        native engine, so that neither can be out of date. With it they are packed at the first call in each precision,
        for the same bits. Memory: one more copy of the weights for each precision used, in that precision, until
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
        self._frozen = FrozenNets(self.bijections)
        return self

    def unfreeze(self) -> Self:
        """Take the promise of `freeze` back and let go of the packed weights."""
        self._frozen = None
        return self

    @property
    def config(self) -> dict[str, object]:
        """The constructor's arguments, as JSON can hold them; what `save_pretrained` writes."""
        return self._config.json()

    # What `TarFlow` does with images, and a flow over tokens leaves as it is.

    def _check_input(self, where: str, x: object, y: object) -> Tensor | None:
        check_tensor(where, "x", x, ("B", *self.var.shape), self.var)
        return check_labels(where, y, x.size(0), self.num_classes, self.var)

    def _to_tokens(self, x: Tensor) -> Tensor:
        return x

    def _from_tokens(self, tokens: Tensor) -> Tensor:
        return tokens

    def forward(self, x: Tensor, y: Tensor | int | None = None) -> tuple[Tensor, Tensor]:
        """Tokens to noise: x -> z = f_K(... f_1(x)), with its log-determinant.

        Args:
            x: (B, T, D) tokens; the parameters' dtype, under autocast any of float32, bfloat16 and float16.
            y: (B,) integer labels, negative for "no label" (the mean class embedding); an int for all rows; None for
                no labels at all. An unconditional flow takes no notice of them.

        Returns:
            z (B, T, D); log |det dz/dx| (B,), nats, summed over all dimensions, float32 (float64 for a float64 model).

        Raises:
            TypeError, ValueError: x or y of the wrong shape, dtype or device; a label not below num_classes.
        """
        y = self._check_input("forward", x, y)
        return self._encode(x, y)

    def _encode(self, tokens: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        log_det = torch.zeros((), device=tokens.device)
        for block in self.blocks:
            tokens, stretched = block(tokens, y, backend=self.backend, mean=False)
            log_det = log_det + stretched
        return tokens, log_det

    @torch.no_grad()
    def update_prior(self, z: Tensor) -> None:
        """Move the prior's variance a tenth of the way to the batch mean of z^2, z (B, T, D); for nvp=False."""
        check_tensor("update_prior", "z", z, ("B", *self.var.shape), self.var, scaled=True)
        if len(z) == 0:
            raise ValueError("update_prior: z must hold at least one row, got 0")
        self.var.lerp_(z.pow(2).mean(dim=0).to(self.var.dtype), 0.1)

    def inverse(
        self,
        z: Tensor,
        y: Tensor | int | None = None,
        *,
        guidance: float = 0.0,
        guide_what: str = "ab",
        attn_temp: float = 1.0,
        annealed_guidance: bool = False,
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
    ) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Report]:
        """Noise to tokens, the inverse of `forward`, blocks last to first, in a block one token after another or by
        windows.

        The prior's variance has no part in it: z is what `forward` gives, not standard noise, unless var is 1.

        Args:
            z: (B, T, D), never written.
            y: (B,) integer labels, negative for "no label"; an int for all rows; None for the mean class embedding.
            guidance: weight g >= 0 of a = a_c + g (a_c - a_u), b likewise; the unguided pass u sees no label.
            guide_what: 'a', 'b' or 'ab': what guidance acts on.
            attn_temp: temperature of the attention logits of the unguided pass, > 0; guides flows without labels.
            annealed_guidance: let g grow over the tokens, g (i + 1) / (T - 1).
            differentiable: keep an autograd graph; without it the result carries no gradient.
            nonfinite: what to do when a row overflows: 'warn' (and return it), 'raise' NonFiniteError, or 'ignore'.
            progress: show a progress bar over all tokens of all blocks.
            precision: 'fp32', 'bf16' or 'int8' (native CPU engine only), where an engine computes in it; None: that of
                the parameters, bf16 under autocast(bfloat16).
            memory_limit: bytes the engine may take, CPU or GPU, all of what a frozen model keeps included (a larger
                batch is inverted in parts, with the same bits); None: most of what the machine has left.
            solver: 'sequential', one token after another; 'windows', up to `window` tokens together, in fewer passes;
                'auto', one after another, but by windows where `calibrate` measured that they are faster.
            tolerance: of 'windows': the largest |transform^-1(z_{i+1}; net(x_0 .. x_i)) - x_{i+1}| of any token in any
                block, but for rounding; 0 moves no bit; None: 1e-3.
            window: of 'windows': tokens of a row in a pass; None: 16.
            draft: of 'windows' on the native CPU engine: a cheaper precision, 'bf16' or 'int8', in which each block is
                solved one token after another first. Windows then start from these values; None: from guesses.
            return_report: return a `Report` as well: passes, tokens accepted, fallbacks, residuals.

        Returns:
            x (B, T, D) in z's dtype; log |det dx/dz| (B,), nats, summed over all dimensions (of the guided map, where
            there is guidance), float32 (float64 for a float64 model).

        Raises:
            TypeError, ValueError: an argument of the wrong type, shape, dtype, device or range.
            NonFiniteError: see `nonfinite`.
            RuntimeError: a backend or precision asked for by name cannot run; a frozen model was changed.
            MemoryError: one row alone needs more than `memory_limit`.
        """
        check_tensor("inverse", "z", z, ("B", *self.var.shape), self.var)
        y = check_labels("inverse", y, z.size(0), self.num_classes, self.var)
        guide = self._guidance("inverse", guidance, guide_what, attn_temp, annealed_guidance)
        bad = NonFinite("inverse", nonfinite, z.size(0))
        solving = Solving("inverse", solver, tolerance, window, differentiable, draft)
        with (
            torch.set_grad_enabled(differentiable and torch.is_grad_enabled()),
            self._call("inverse", precision, differentiable, memory_limit, solving) as call,
            self._progress("inverse", 1 if progress else 0) as on_token,
        ):
            stages, log_det = self._invert(z, y, guide, call, bad, on_token)
        bad.warn()
        return (stages[-1], log_det, solving.report) if return_report else (stages[-1], log_det)

    def _guidance(self, where: str, *arguments: Any) -> Guidance:
        """The guidance arguments of a call, checked."""
        guide = Guidance(*arguments, where=where)
        guide.check(self.blocks[0].transform)
        return guide

    def _call(
        self,
        where: str,
        precision: str | None,
        differentiable: bool,
        memory_limit: int | None,
        solving: Solving | None = None,
    ) -> Call:
        if solving is not None:
            solving.plan = self.solver_plan
        return Call(self.backend, precision, differentiable, memory_limit, self.blocks, self._frozen, where, solving)

    def calibrate(
        self,
        n: int = 16,
        *,
        batch_sizes: Sequence[int] | None = None,
        precisions: Sequence[str] = ("fp32", "bf16"),
        guidance: float = 0.0,
        tolerance: float = TOLERANCE,
        seed: int = 0,
        progress: bool = False,
    ) -> Calibration:
        """Measure where windows are faster on this machine, and let solver 'auto' use that from now on.

        Each block is inverted one token after another and by windows, from guesses and from drafts, in turn. 'auto'
        then takes windows where they took less than 0.9 of the time (docs/windows.md says for which calls). Its tokens
        satisfy their equations to within the tolerance; without a plan they are those of 'sequential' to the bit.

        Args:
            n: samples.  batch_sizes: measured, at most n each; None: 1, 4, 16, ... up to n.
            precisions: measured; 'auto' stays sequential in others.
            guidance: weight, for flows with classes; a plan without guidance is not used for calls with it.
            tolerance: of the windows, > 0.
            seed: of noise and labels.  progress: show a progress bar.

        Returns:
            A `Calibration`: `rows`, `plan`; as text a table. `calibration.plan.save(folder)` stores the plan beside
            the weights, where `from_pretrained` finds it.

        Raises:
            TypeError, ValueError: an argument of the wrong type or range.
            RuntimeError: the native engine cannot take a block; the reason is named.
        """
        from tarflow_fast.solvers.calibrate import calibrate

        check_positive_int("calibrate", "n", n)
        sizes = [4**k for k in range(20) if 4**k < n] + [n] if batch_sizes is None else list(batch_sizes)
        for B in sizes:
            check_positive_int("calibrate", "batch_sizes", B)
            if B > n:
                raise ValueError(f"calibrate: batch_sizes must be at most n = {n}, got {B}")
        check_number("calibrate", "tolerance", tolerance)
        if not 0 < tolerance < float("inf"):
            raise ValueError(f"calibrate: tolerance must be finite and > 0, got {tolerance}")
        guide = Guidance(guidance, where="calibrate")
        for precision in precisions:
            Call(precision=precision, where="calibrate")
        generator = torch.Generator().manual_seed(seed)
        z = torch.randn(n, *self.var.shape, generator=generator).to(self.var) * self.var.sqrt()
        y = torch.randint(self.num_classes, (n,), generator=generator) if self.num_classes else None

        def open_call(precision: str, solving: Solving) -> Call:
            return Call("cpu", precision, False, None, self.blocks, self._frozen, "calibrate", solving)

        settings = len(precisions) * len(sizes) * len(self.blocks)
        with torch.no_grad(), _bar("calibrate", settings if progress else 0, "setting") as tick:
            found = calibrate(self.bijections, z, y, guide, sizes, precisions, float(tolerance), open_call, tick)
        self.solver_plan = found.plan
        return found

    def _invert(
        self,
        z: Tensor,
        y: Tensor | None,
        guide: Guidance,
        call: Call,
        bad: NonFinite,
        on_token: Callable[[], None] | None,
    ) -> tuple[list[Tensor], Tensor]:
        """The K + 1 stages (B, T, D) of the inverse of z, checked, z itself first, and log |det dx/dz| (B,).

        `bad` learns of overflows.
        """
        if idle := guide.why_idle(y is not None):
            warn_once(f"{guide.where}: {idle}")
        begin, stages = bad.seen, [z]
        log_det = torch.zeros((), dtype=wide_dtype(z), device=z.device)
        for tokens, stretched in invert_all(self.bijections, z, y, guide, call, on_token):
            stages.append(tokens)
            log_det = log_det + stretched
        if bad.in_part(stages[-1]):
            bad.at(first_overflow(stages, self.bijections, begin, guide.active))
        return stages, log_det

    @contextmanager
    def _progress(self, where: str, parts: int) -> Iterator[Callable[[], None] | None]:
        """What to call for every token solved in `parts` inverses one after another, for a progress bar; 0: no bar."""
        with _bar(where, parts * len(self.blocks) * (self.num_tokens - 1), "token") as update:
            yield update

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.config.items())


@contextmanager
def _bar(where: str, total: int, unit: str) -> Iterator[Callable[[], None] | None]:
    """What to call for every unit done, for a progress bar; 0: no bar."""
    if not total:
        yield None
        return
    from tqdm.auto import tqdm  # only here, so that a bare machine samples without it

    with tqdm(total=total, desc=where, unit=unit, leave=False) as bar:
        yield bar.update
