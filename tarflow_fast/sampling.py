"""Drawing from a flow: samples, and a million of them with their log-density."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from tarflow_fast.dtypes import wide_dtype
from tarflow_fast.solvers import Report, Solving
from tarflow_fast.solvers.nonfinite import NonFinite
from tarflow_fast.validate import check_labels, check_positive_int, seeded

__all__ = ["SamplingMixin"]

_ROWS = 4096  # of a million samples, drawn together: enough that what is done once a part does not count


class SamplingMixin:
    """Methods of `TokenFlow` and `TarFlow`."""

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
        solver: str = "auto",
        tolerance: float | None = None,
        window: int | None = None,
        draft: str | None = None,
        return_report: bool = False,
    ) -> Tensor | list[Tensor] | tuple[Tensor | list[Tensor], Report]:
        """Draw n samples. The noise is made on the CPU in float32, so a seed means the same samples on every device.

        Args:
            n: number of samples.
            y: (n,) integer labels, or one label for all, or None.
            seed: seed of the noise; or pass a CPU `generator`; neither: the global CPU generator.
            batch_size: samples inverted together; None for all at once. It does not change the noise.
            The rest as in `inverse`.

        Returns:
            (n, T, D) tokens, or of a TarFlow (n, in_channels, height, width) images; with return_sequence the list of
            K + 1 stages of them.

        Raises:
            TypeError, ValueError: as `inverse`; labels given to an unconditional flow; both seed and generator.
        """
        check_positive_int("sample", "n", n, 0)
        guide = self._guidance("sample", guidance, guide_what, attn_temp, annealed_guidance)
        batch_size = max(n, 1) if batch_size is None else check_positive_int("sample", "batch_size", batch_size)
        y, generator = self._check_draw("sample", n, y, seed, generator)
        noise = torch.randn(n, *self.var.shape, generator=generator, dtype=torch.float32, device="cpu").to(self.var)
        solving = Solving("sample", solver, tolerance, window, draft=draft)
        parts, starts, bad = [], range(0, max(n, 1), batch_size), NonFinite("sample", nonfinite, n)
        with (
            torch.no_grad(),
            self._call("sample", precision, False, memory_limit, solving) as call,
            self._progress("sample", len(starts) if progress else 0) as on_token,
        ):
            for start in starts:
                rows = slice(start, start + batch_size)
                z = noise[rows] * self.var.sqrt()
                stages, _ = self._invert(z, None if y is None else y[rows], guide, call, bad, on_token)
                stages[0] = noise[rows]
                parts.append(stages if return_sequence else stages[-1:])
        bad.warn()
        samples = [self._from_tokens(torch.cat(stage)) for stage in zip(*parts, strict=True)]
        drawn = samples if return_sequence else samples[-1]
        return (drawn, solving.report) if return_report else drawn

    def _check_draw(
        self, where: str, n: int, y: Tensor | int | None, seed: int | None, generator: torch.Generator | None
    ) -> tuple[Tensor | None, torch.Generator | None]:
        """Labels and generator of n samples, checked."""
        if y is not None and not self.num_classes:
            raise ValueError(f"{where}: y must be None for an unconditional flow (num_classes = 0), got labels")
        y = check_labels(where, y, n, self.num_classes, self.var)
        if seed is not None:
            if generator is not None:
                raise ValueError(f"{where}: pass seed or generator, got both")
            generator = seeded(where, seed)
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"{where}: generator must be a torch.Generator, got {type(generator).__name__}")
        return y, generator

    @torch.no_grad()
    def sample_and_log_prob(
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
        batch_size: int = _ROWS,
        progress: bool = False,
        nonfinite: str = "warn",
        precision: str | None = None,
        memory_limit: int | None = None,
        solver: str = "auto",
        tolerance: float | None = None,
        window: int | None = None,
        draft: str | None = None,
        return_report: bool = False,
    ) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Report]:
        """Draw n samples, a million if need be, with the log-density of each: log N(z; 0, var) - log |det dx/dz|.

        The samples are those of `sample` with the same seed. Noise lies where the samples will (a flow on a GPU or in
        another dtype than float32 keeps it in host memory as well), so that memory is the outputs and one part.

        Args:
            n: number of samples, at least 1.
            y: (n,) integer labels, or one label for all, or None.
            seed: seed of the noise; or pass a CPU `generator`; neither: the global CPU generator.
            batch_size: samples inverted together. It changes no bit of the result.
            progress: show a progress bar over the samples.
            The rest as in `inverse`.

        Returns:
            x: (n, T, D) tokens, or of a TarFlow (n, in_channels, height, width) images. log_prob: (n,), nats, float32
            (float64 for a float64 model). Under guidance it is the density of the guided flow, from which x is drawn.

        Raises:
            TypeError, ValueError: as `inverse`; labels given to an unconditional flow; both seed and generator.
        """
        where = "sample_and_log_prob"
        n, batch_size = (check_positive_int(where, *pair) for pair in (("n", n), ("batch_size", batch_size)))
        guide = self._guidance(where, guidance, guide_what, attn_temp, annealed_guidance)
        y, generator = self._check_draw(where, n, y, seed, generator)
        noise = torch.randn(n, *self.var.shape, generator=generator, dtype=torch.float32, device="cpu")
        x = (
            noise
            if noise.dtype == self.var.dtype and self.var.device.type == "cpu"
            else self.var.new_empty(noise.shape)
        )
        log_prob = torch.empty(n, dtype=wide_dtype(self.var), device=self.var.device)
        std, bad = self.var.sqrt(), NonFinite(where, nonfinite, n)
        # The constant of the prior: z is std times noise, so the noise alone makes the rest.
        constant = -(0.5 * math.log(2 * math.pi) * self.var.numel() + std.double().log().sum().item())
        solving = Solving(where, solver, tolerance, window, draft=draft)
        with (
            self._call(where, precision, False, memory_limit, solving) as call,
            _bar(where, n if progress else 0) as advance,
        ):
            for start in range(0, n, batch_size):
                rows = slice(start, start + batch_size)
                part = noise[rows].to(self.var)
                # summed in float64 and row by row alike, so that the batch size changes no bit
                prior = part.double().square().flatten(1).sum(dim=1) * -0.5 + constant
                stages, log_det = self._invert(part * std, None if y is None else y[rows], guide, call, bad, None)
                x[rows] = stages[-1]
                log_prob[rows] = (prior - log_det).to(log_prob.dtype)
                advance(len(part))
        bad.warn()
        drawn = self._from_tokens(x), log_prob
        return (*drawn, solving.report) if return_report else drawn


@contextmanager
def _bar(where: str, samples: int) -> Iterator[Callable[[int], object]]:
    """What to call with the number of samples that were drawn, for a progress bar; 0: no bar."""
    if not samples:
        yield lambda count: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=samples, desc=where, unit="sample", leave=False) as bar:
        yield bar.update
