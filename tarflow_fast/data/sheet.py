"""Sheets of pictures with names, as in a paper: bands below one another, each of panels next to each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from tarflow_fast.data.images import load_font

if TYPE_CHECKING:
    from PIL.Image import Image

BORDER, BESIDE, GREY = 16, 12, (96, 96, 96)  # pixels around the sheet and beside names; the colour of what is less


@dataclass(frozen=True)
class Band:
    """Panels next to each other, and names to the left of their rows.

    panels: (caption, (height, width, 3) uint8) pairs; a caption stands above its panel, a second line of it in grey.
    names: of the rows, from top to bottom, which share the height of the panels evenly; none: no names.
    title: a line above all of them.
    """

    panels: Sequence[tuple[str, torch.Tensor]]
    names: Sequence[str] = ()
    title: str = ""


def sheet(bands: Sequence[Band], *, text: int = 22, gap: int = 24) -> Image:
    """Bands below one another, black on white.

    The names of all bands share one margin. The panels of a band of two or more are spread over the width of the widest
    band, so that the sheet has one right edge. Text of a caption or name that would not fit is set smaller.
    text: height of a line of text in pixels.  gap: least number of pixels between panels.
    Raises ValueError for no band, or a band without a panel.
    """
    from PIL import Image, ImageDraw

    if not bands or not all(band.panels for band in bands):
        raise ValueError(
            "sheet: bands must be bands of at least one panel each, got " + ("an empty one" if bands else "none")
        )
    font = load_font(text)
    margin = max((round(font.getlength(name)) + BESIDE for band in bands for name in band.names), default=0)
    width = max(_width(band) + gap * (len(band.panels) - 1) for band in bands)
    lines = [max(caption.count("\n") + 1 if caption else 0 for caption, _ in band.panels) for band in bands]
    step = round(text * 1.3)
    heights = [
        step * (count + 1.2 * bool(band.title)) + max(grid.shape[0] for _, grid in band.panels)
        for band, count in zip(bands, lines, strict=True)
    ]
    size = (margin + width + 2 * BORDER, round(sum(heights) + gap * (len(bands) - 1) + 2 * BORDER))
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    top = BORDER
    for band, height, count in zip(bands, heights, lines, strict=True):
        if band.title:
            draw.text((BORDER + margin, top), band.title, fill="black", font=font)
        below = round(top + 1.2 * step * bool(band.title))
        _draw_band(image, draw, band, (BORDER + margin, below), width, text, count)
        top = round(top + height + gap)
    return image


def _width(band: Band) -> int:
    return sum(grid.shape[1] for _, grid in band.panels)


def _draw_band(
    image: Image, draw: object, band: Band, corner: tuple[int, int], width: int, text: int, lines: int
) -> None:
    """The panels, from corner on, and what is written above and beside them."""
    from PIL import Image

    (left, top), step = corner, round(text * 1.3)
    space = (width - _width(band)) / max(1, len(band.panels) - 1)
    place, row = float(left), top + step * lines
    for caption, grid in band.panels:
        for number, line in enumerate(caption.split("\n")):
            font = _fitting(line, text, grid.shape[1] + min(space, step))
            draw.text((round(place), top + number * step), line, fill=GREY if number else "black", font=font)
        image.paste(Image.fromarray(grid.numpy()), (round(place), row))
        place += grid.shape[1] + space
    height = max(grid.shape[0] for _, grid in band.panels) / max(1, len(band.names))
    for number, name in enumerate(band.names):
        font = _fitting(name, text, left)
        _, above, right, bottom = font.getbbox(name)
        draw.text(
            (left - BESIDE - right, row + (number + 0.5) * height - (above + bottom) / 2), name, fill="black", font=font
        )


def _fitting(line: str, text: int, width: float) -> object:
    """The font in which a line is at most so wide, no larger than text, and no smaller than 8."""
    while text > 8 and load_font(text).getlength(line) > width:
        text -= 1
    return load_font(text)
