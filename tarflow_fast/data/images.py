"""Pictures of tensors: grids, captions, PNG files. Needs Pillow and numpy only at the call."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from PIL.Image import Image


def to_uint8(x: torch.Tensor, value_range: tuple[float, float] = (-1.0, 1.0)) -> torch.Tensor:
    """Bytes of images: round(255 * (x - low) / (high - low)), clipped to 0..255; a NaN becomes 0.

    x: any shape, any float dtype.  Returns uint8 of the same shape, on the CPU.
    Raises ValueError when value_range is not (low, high) with low < high.
    """
    low, high = value_range
    if not low < high:
        raise ValueError(f"to_uint8: value_range must be (low, high) with low < high, got ({low}, {high})")
    scaled = (x.detach().to("cpu", torch.float32) - low) * (255.0 / (high - low))
    return scaled.nan_to_num(nan=0.0).round().clamp(0, 255).to(torch.uint8)


def make_grid(
    x: torch.Tensor,
    nrow: int = 16,
    value_range: tuple[float, float] = (-1.0, 1.0),
    scale: int = 1,
    padding: int = 2,
    background: int = 96,
) -> torch.Tensor:
    """Lays images out in rows of nrow, left to right and top to bottom.

    x: (N, C, H, W), C = 1 (grey) or 3 (RGB), values in value_range; or uint8, taken as it is.
    scale: each pixel becomes scale x scale pixels (no smoothing).  padding: pixels between images and around them, of
    grey level background, neither ink nor paper by default.
    Returns (height, width, 3) uint8, height = rows * (scale * H + padding) + padding.
    Raises ValueError for another shape, no image at all, or sizes below 1.
    """
    if x.ndim != 4 or x.shape[0] == 0 or x.shape[1] not in (1, 3):
        raise ValueError(f"make_grid: x must have shape (N, 1 or 3, H, W) with N > 0, got {tuple(x.shape)}")
    for name, value, least in (("nrow", nrow, 1), ("scale", scale, 1), ("padding", padding, 0)):
        if value < least:
            raise ValueError(f"make_grid: {name} must be at least {least}, got {value}")
    pixels = x.detach().cpu() if x.dtype == torch.uint8 else to_uint8(x, value_range)
    pixels = pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1)
    pixels = pixels.repeat_interleave(scale, dim=1).repeat_interleave(scale, dim=2)
    count, height, width, _ = pixels.shape
    columns = min(nrow, count)
    rows = -(-count // columns)
    grid = torch.full(
        (rows * (height + padding) + padding, columns * (width + padding) + padding, 3), background, dtype=torch.uint8
    )
    for i in range(count):
        top = padding + (i // columns) * (height + padding)
        left = padding + (i % columns) * (width + padding)
        grid[top : top + height, left : left + width] = pixels[i]
    return grid


def save_image(pixels: torch.Tensor | Image, path: str | Path) -> None:
    """Writes (height, width, 3) uint8, or a Pillow image, as a PNG file; whole or not at all."""
    from PIL import Image

    from tarflow_fast.files import write_atomic

    image = Image.fromarray(pixels.numpy()) if isinstance(pixels, torch.Tensor) else pixels
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, lambda temporary: image.save(temporary, format="PNG"))


def save_grid(
    x: torch.Tensor,
    path: str | Path,
    nrow: int = 16,
    value_range: tuple[float, float] = (-1.0, 1.0),
    scale: int = 1,
    padding: int = 2,
) -> None:
    """`make_grid`, written as a PNG file; the folder is made where it is missing."""
    save_image(make_grid(x, nrow, value_range, scale, padding), path)


def side_by_side(panels: list[tuple[str, torch.Tensor]], gap: int = 16, caption: int = 40) -> Image:
    """Panels next to each other, a caption above each, on white.

    panels: (caption text, (height, width, 3) uint8) pairs.  gap: pixels between.  caption: height of the text line.
    """
    from PIL import Image, ImageDraw

    font = load_font(round(caption * 0.5))
    width = sum(grid.shape[1] for _, grid in panels) + gap * (len(panels) + 1)
    height = max(grid.shape[0] for _, grid in panels) + caption + gap
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    left = gap
    for text, grid in panels:
        draw.text((left + 2, caption * 0.25), text, fill="black", font=font)
        image.paste(Image.fromarray(grid.numpy()), (left, caption))
        left += grid.shape[1] + gap
    return image


def load_font(size: int) -> object:
    """Pillow's own font, letters about `size` pixels high."""
    from PIL import ImageFont

    try:
        return ImageFont.load_default(size=size)
    except (TypeError, ImportError):  # Pillow before 10.1, or one built without FreeType: the small bitmap font
        return ImageFont.load_default()
