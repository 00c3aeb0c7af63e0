"""The command `verify`: of the kernels on this machine, or of a user's flow."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

if TYPE_CHECKING:
    import torch

    from tarflow_fast.flow import TokenFlow

_LEVELS = 256  # of images in a file of integers


@dataclass(frozen=True)
class Verify:
    """Checks every kernel on this machine against float64; or, given a flow, how well that flow inverts itself."""

    model: Positional[Annotated[str | None, arg(metavar="FLOW")]] = None
    """Checks this flow instead: digits, a folder, or a checkpoint file."""
    data: str | None = None
    """On these rows: digits, a folder of images, a .npy file, or a .npz file with x and, if any, labels y, where x has
    the shape that the flow takes; left out: samples of the flow."""
    n: int = 256
    """Rows, drawn at random where the data has more."""
    seed: int = 0
    """Of the noise, the rows drawn, and the dequantisation of images."""
    json: bool = False
    """As JSON."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    dtype: Literal["float32", "float64", "bfloat16", "float16"] = "float32"
    """Of the weights and the computation."""
    precision: Literal["fp32", "bf16", "int8"] | None = None
    """What the engine computes the inverse in; left out: that of dtype."""
    jacobian_rows: int | None = None
    """Rows whose Jacobian is computed by autograd; left out: 4, or fewer where that is slow."""
    in_channels: Annotated[int | None, arg(aliases=["--channel_size"])] = None
    """Of a checkpoint file's images: 3, or this."""
    img_size: tuple[int, int] | None = None
    """Height and width of a checkpoint file's images, where they are not square."""
    head_size: int | None = None
    """Of a checkpoint file over tokens, which its shapes do not tell: 64, or this."""
    key: str | None = None
    """The part of a checkpoint file that is the flow, where it holds several ("state_dict", "ema")."""

    def run(self) -> int:
        from tarflow_fast.validate import find_device

        device = find_device("verify", self.device)
        if self.model is not None:
            return self._run_flow(device)
        ignored = [name for name in vars(self) if name != "device" and getattr(self, name) != getattr(Verify, name)]
        if ignored:
            raise ValueError(f"verify: {', '.join(ignored)} must come with a flow: tarflow-fast verify FLOW")
        from tarflow_fast import verify

        rows, ok = verify.run(str(device))
        print(_table(rows))
        print("all within their limits" if ok else "NOT all within their limits")
        return 0 if ok else 1

    def _run_flow(self, device: torch.device) -> int:
        import torch

        from tarflow_fast.flows import open_flow
        from tarflow_fast.validate import check_positive_int
        from tarflow_fast.verify import verify_flow

        n = check_positive_int("verify", "n", self.n)
        flow, _ = open_flow(
            self.model, dtype=getattr(torch, self.dtype), device=device, in_channels=self.in_channels,
            img_size=self.img_size, head_size=self.head_size, key=self.key,
        )  # fmt: skip
        if self.data is None:
            x, y = None, torch.arange(n) % flow.num_classes if flow.num_classes else None  # every class it knows
        else:
            x, y = _read(flow, self.data, n, self.seed)
            x = x.to(flow.var)
        report = verify_flow(
            flow, x, None if y is None else y.to(device), n=n if x is None else None, seed=self.seed,
            precision=self.precision, jacobian_rows=self.jacobian_rows,
        )  # fmt: skip
        print(json.dumps(report.json(), indent=2, allow_nan=False) if self.json else report.table())
        return 0 if report.ok else 1


def _read(flow: TokenFlow, name: str, n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """At most n rows of the data called name, as the flow's `forward` takes them, and their labels, on the CPU."""
    import torch

    from tarflow_fast.data import dequantize, generator, load_dataset
    from tarflow_fast.evaluate import load_tokens
    from tarflow_fast.model import TarFlow

    def draw(size: int) -> torch.Tensor:
        return torch.randperm(size, generator=generator(seed, "verify, rows"))[:n].sort().values

    over_images = isinstance(flow, TarFlow)
    if not over_images or Path(name).suffix in (".npy", ".npz"):
        shape = tuple(flow.var.shape)
        if over_images:
            shape = flow.in_channels, *(side * flow.patch_size for side in flow.grid)
        arrays = load_tokens(name, shape)
        rows = draw(len(arrays[0])).numpy()
        x, y = (None if each is None else torch.from_numpy(each[rows]) for each in arrays)
        if not over_images or x.is_floating_point():
            return x, y
        if not 0 <= int(x.min()) <= int(x.max()) < _LEVELS:
            raise ValueError(
                f"verify: integers in {name} must be in [0, {_LEVELS}), got [{int(x.min())}, {int(x.max())}]"
            )
        levels = _LEVELS
    else:
        images = load_dataset(name, flow.img_size, flow.in_channels)
        if images.labels is not None and flow.num_classes not in (0, len(images.classes)):
            raise ValueError(
                f"verify: images must have the flow's {flow.num_classes} classes, got {len(images.classes)} ({name})"
            )
        x, y = images.fetch(draw(len(images)))
        levels = images.levels
    # The numbers that `evaluate` measures bits on: in [-1, 1), with uniform noise of one level.
    return dequantize(x, torch.rand(x.shape, generator=generator(seed, "verify, dequantise")), levels), y


def _table(rows: list[dict[str, Any]]) -> str:
    """Rows of the same keys as a markdown table."""
    names = list(rows[0])
    cells = [[f"{row[name]:.3g}" if isinstance(row[name], float) else str(row[name]) for name in names] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in [names, ["---"] * len(names), *cells])
