"""Draws how-it-works.svg: `python docs/how_it_works.py`."""

from pathlib import Path

PATH = Path(__file__).with_suffix("").with_name("how-it-works.svg")
INK, SOFT, KNOWN, NEW, OPEN, NET = "#1b1f24", "#57606a", "#9ccbee", "#f5b971", "#ffffff", "#e6e9ee"
SIZE, GAP, LEFT = 40, 8, 120  # of a token, between tokens, and where the rows begin


def text(x: float, y: float, words: str, size: int = 14, anchor: str = "middle", fill: str = INK) -> str:
    return f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}" fill="{fill}">{words}</text>'


def box(x: float, y: float, width: float, height: float, fill: str, words: str = "") -> str:
    rect = f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="5" fill="{fill}" stroke="{INK}"/>'
    return rect + (text(x + width / 2, y + height / 2 + 5, words) if words else "")


def arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{INK}" stroke-width="1.5" marker-end="url(#tip)"/>'


def place(i: int) -> float:
    return LEFT + i * (SIZE + GAP)


def tokens(y: float, name: str, fills: list[str]) -> list[str]:
    parts = [text(LEFT - 14, y + 25, name, anchor="end")]
    return parts + [box(place(i), y, SIZE, SIZE, fill, f"{name}{i}") for i, fill in enumerate(fills)]


def one_step(y: float) -> list[str]:
    """The pass that finds token 3 of 6: the net sees token 2 and what its cache keeps of tokens 0 and 1."""
    known, i = [KNOWN] * 3 + [NEW] + [OPEN] * 2, 3
    parts = [text(LEFT, y - 14, "1. One pass finds one token, or, by windows, several", 15, "start")]
    parts += tokens(y, "x", known)
    parts += [box(place(0), y + 75, 3 * SIZE + 2 * GAP, 44, NET, "net + cache")]
    parts += [arrow(place(2) + SIZE / 2, y + SIZE, place(2) + SIZE / 2, y + 73)]
    parts += [arrow(place(3) - GAP, y + 97, place(i) + 14, y + 97), text(place(i) + 34, y + 102, "a, b")]
    parts += [arrow(place(i) + SIZE / 2, y + 84, place(i) + SIZE / 2, y + SIZE + 2)]
    parts += tokens(y + 145, "z", [OPEN] * 6)
    parts += [arrow(place(i) + SIZE / 2, y + 143, place(i) + SIZE / 2, y + 110)]
    return [*parts, text(place(6) + 10, y + 25, "x3 = z3 exp(a) + b", 14, "start")]


def blocks(y: float) -> list[str]:
    """The K blocks of a flow, each with its order of tokens."""
    parts = [
        text(LEFT, y - 14, "2. K blocks in turn, each in an order of its own", 15, "start"),
        box(20, y, 70, 44, OPEN, "noise"),
    ]
    for k, name in enumerate(("block K", "...", "block 1")):
        x = LEFT + k * 120
        parts += [arrow(x - 28, y + 22, x - 2, y + 22), box(x, y, 90, 44, NET, name)]
    return [*parts, arrow(LEFT + 332, y + 22, LEFT + 358, y + 22), box(LEFT + 360, y, 80, 44, KNOWN, "image")]


def cost(y: float) -> list[str]:
    """What a pass reads: every weight of the block once, for all rows of the batch together."""
    parts = [text(LEFT, y - 14, "3. What bounds it: each pass reads every weight of its block", 15, "start")]
    parts += [
        box(LEFT, y, 300, 44, NET, "weights, 12 C C L numbers"),
        box(LEFT + 308, y, 132, 44, KNOWN, "cache, 2 C L i R"),
    ]
    return [
        *parts,
        text(LEFT, y + 66, "least time of a pass = max(bytes / memory speed, FLOPs / peak)", 13, "start", SOFT),
    ]


def picture() -> str:
    parts = [*one_step(50), *blocks(300), *cost(410)]
    tip = '<marker id="tip" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto">'
    tip += '<path d="M0 0L8 4L0 8z"/></marker>'
    head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 620 500" font-family="DejaVu Sans, Verdana">'
    ground = f'<defs>{tip}</defs>\n<rect width="620" height="500" fill="#ffffff"/>'
    return "\n".join([head, ground, *parts, "</svg>\n"])


if __name__ == "__main__":
    PATH.write_text(picture())
    print(PATH)
