"""A page of documentation that a script writes between two markers, and its pictures."""

from __future__ import annotations

import io
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tarflow_fast import data
from tarflow_fast.cli.demo import denoised, draw_noise
from tarflow_fast.data.sheet import Band, sheet
from tarflow_fast.files import write_atomic
from tarflow_fast.flows import training_noise
from tarflow_fast.model import TarFlow

BEGIN, END = "<!-- bench/quality.py wrote from here -->", "<!-- to here -->"
LIMIT = 700_000  # bytes of the pictures of a page, the training curve aside; colour and noise compress badly
CELL = 56  # pixels of an image on a sheet, about


@dataclass
class Page:
    """A flow, its data, and what is said and shown of it so far.

    known, test: images in [-1, 1] that it was trained on, and others; seen: whether it was trained on these as well.
    """

    name: str
    model: TarFlow
    record: dict
    known: data.ImageSet
    test: data.ImageSet
    seen: bool
    seed: int
    count: int
    text: list[str] = field(default_factory=list)
    pictures: dict[str, bytes] = field(default_factory=dict)

    @property
    def sigma(self) -> float | None:
        """Of the Gaussian noise in training; None of uniform noise."""
        return training_noise(self.record)

    @property
    def classes(self) -> tuple[str, ...]:
        return self.known.classes if self.model.num_classes else ()

    def layout(self) -> dict[str, int]:
        """Of `make_grid`."""
        return dict(scale=max(1, round(CELL / self.known.shape[-1])), padding=3)

    def labels(self, each: int) -> torch.Tensor | None:
        """`each` of every class, one class after the other; None without classes."""
        return torch.arange(len(self.classes)).repeat_interleave(each) if self.classes else None

    def draw(self, count: int, y: torch.Tensor | None, seed: int, **settings: float) -> torch.Tensor:
        """Denoised samples, 100 at a time. What overflows is returned as it is."""
        noise = draw_noise(self.model, count, seed)
        drawn = []
        for rows in torch.arange(count).split(100):
            labels = None if y is None else y[rows]
            x = self.model.reverse(noise[rows], labels, nonfinite="ignore", **settings)
            drawn.append(denoised(self.model, x, labels, self.sigma))
        return torch.cat(drawn)

    def show(self, kind: str, alt: str, bands: list[Band], gap: int = 24) -> None:
        """Puts a picture on the page."""
        image = sheet(bands, gap=gap)
        if self.known.shape[0] == 1:
            image = image.convert("L")
        written = io.BytesIO()
        image.save(written, format="PNG", optimize=True)
        self.pictures[f"{self.name}-{kind}.png"] = written.getvalue()
        self.text.append(f"![{alt}]({self.name}-{kind}.png)")

    def table(self, head: list[str], rows: list[list[str]]) -> None:
        """Puts a table on the page."""
        lines = [head, ["---"] * len(head), *rows]
        self.text.append("\n".join("| " + " | ".join(line) + " |" for line in lines))

    def say(self, *paragraphs: str) -> None:
        """Puts headings and paragraphs on the page, in lines of at most 120 letters."""
        self.text += [textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False) for text in paragraphs]


def write(page: Page, out: Path) -> str:
    """Writes the page and its pictures into out; returns what was written, in words.

    Raises ValueError where the pictures take more than LIMIT, or the page that is there has not both markers.
    """
    path = out / f"{page.name}.md"
    text = "\n\n".join([BEGIN, *page.text, END])
    if path.exists():
        before, begin, rest = path.read_text().partition(BEGIN)
        _, end, after = rest.partition(END)
        if not begin or not end:
            raise ValueError(f"quality: {path} must hold the lines {BEGIN} and {END}, between which this page goes")
        text = before + text + after
    else:
        text = f"# What the flow `{page.name}` draws, and how well\n\n{text}\n\n## What it cannot do\n"
    size = sum(map(len, page.pictures.values()))
    if size > LIMIT:
        raise ValueError(f"quality: the pictures of a page must take at most {LIMIT} bytes, got {size}")
    out.mkdir(parents=True, exist_ok=True)
    for name, content in page.pictures.items():
        write_atomic(out / name, lambda temporary, content=content: temporary.write_bytes(content))
    write_atomic(path, lambda temporary: temporary.write_text(text))
    return f"{path}: {len(page.pictures)} pictures, {size} bytes"
