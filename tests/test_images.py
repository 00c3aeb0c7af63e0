"""Grids of images have every pixel where it belongs."""

import numpy as np
import pytest
import torch
from PIL import Image

from tarflow_fast.data.images import make_grid, save_grid, save_image, side_by_side, to_uint8
from tarflow_fast.data.sheet import Band, sheet


def test_to_uint8_rounds_and_clips():
    x = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0, float("nan"), float("inf"), -1 + 2 * 1.6 / 255])
    assert to_uint8(x).tolist() == [0, 0, 128, 255, 255, 0, 255, 2]
    assert to_uint8(torch.tensor([0.0, 5.0]), (0, 10)).tolist() == [0, 128]
    with pytest.raises(
        ValueError, match=r"^to_uint8: value_range must be \(low, high\) with low < high, got \(1, 1\)$"
    ):
        to_uint8(x, (1, 1))


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_puts_images_in_rows(channels):
    x = torch.rand(5, channels, 2, 3) * 2 - 1
    grid = make_grid(x, nrow=3, scale=2, padding=1)
    assert grid.shape == (2 * (4 + 1) + 1, 3 * (6 + 1) + 1, 3) and grid.dtype == torch.uint8
    seen = torch.zeros(grid.shape[:2], dtype=torch.bool)
    for i in range(5):
        top, left = 1 + i // 3 * 5, 1 + i % 3 * 7
        cell = grid[top : top + 4, left : left + 6]
        seen[top : top + 4, left : left + 6] = True
        big = to_uint8(x[i]).repeat_interleave(2, 1).repeat_interleave(2, 2).permute(1, 2, 0)
        assert torch.equal(cell, big.expand(-1, -1, 3))
    assert (grid[~seen] == 96).all()


def test_bytes_are_taken_as_they_are():
    x = torch.arange(12, dtype=torch.uint8).view(1, 3, 2, 2)
    assert torch.equal(make_grid(x, padding=0), x[0].permute(1, 2, 0))


@pytest.mark.parametrize(
    "shape, nrow, message",
    [
        ((2, 3, 4), 4, "make_grid: x must have shape (N, 1 or 3, H, W) with N > 0, got (2, 3, 4)"),
        ((2, 2, 4, 4), 4, "make_grid: x must have shape (N, 1 or 3, H, W) with N > 0, got (2, 2, 4, 4)"),
        ((0, 1, 4, 4), 4, "make_grid: x must have shape (N, 1 or 3, H, W) with N > 0, got (0, 1, 4, 4)"),
        ((2, 1, 4, 4), 0, "make_grid: nrow must be at least 1, got 0"),
    ],
)
def test_bad_grids(shape, nrow, message):
    with pytest.raises(ValueError) as raised:
        make_grid(torch.zeros(shape), nrow)
    assert str(raised.value) == message


def test_saved_grid_reads_back(tmp_path):
    x = torch.rand(4, 3, 5, 5) * 2 - 1
    path = tmp_path / "new" / "grid.png"
    save_grid(x, path, nrow=2, scale=3)
    assert np.array_equal(np.asarray(Image.open(path)), make_grid(x, 2, scale=3).numpy())
    assert [p.name for p in path.parent.iterdir()] == ["grid.png"]


def test_a_failed_save_leaves_the_old_picture(tmp_path):
    path = tmp_path / "grid.png"
    save_grid(torch.zeros(1, 1, 2, 2), path)
    before = path.read_bytes()

    class Broken:
        def save(self, file, format):
            file.write_bytes(b"half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_image(Broken(), path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_panels_stand_side_by_side_under_their_captions():
    left, right = torch.full((10, 20, 3), 50, dtype=torch.uint8), torch.full((30, 40, 3), 90, dtype=torch.uint8)
    picture = np.asarray(side_by_side([("left", left), ("right", right)], gap=5, caption=24))
    assert picture.shape == (30 + 24 + 5, 20 + 40 + 3 * 5, 3)
    assert np.array_equal(picture[24:34, 5:25], left.numpy()) and np.array_equal(picture[24:54, 30:70], right.numpy())
    assert (picture[:24, 5:25] < 128).any() and (picture[:24, 30:70] < 128).any()  # captions are there
    assert (picture[34:, :25] == 255).all()


def flat(height, width, grey):
    return torch.full((height, width, 3), grey, dtype=torch.uint8)


def test_a_sheet_has_one_margin_and_one_right_edge():
    """Panels begin right of the longest name of all, and those of a narrower band are spread to the same edge."""
    wide = Band([("a", flat(40, 200, 50)), ("b", flat(40, 100, 60))], ["one", "another name"])
    narrow = Band([("c", flat(20, 50, 70)), ("d", flat(20, 50, 80)), ("e", flat(20, 50, 90))])
    picture = np.asarray(sheet([wide, narrow], text=16, gap=10))[..., 0]
    boxes = {}
    for grey in (50, 60, 70, 80, 90):
        rows, columns = (np.flatnonzero((picture == grey).sum(axis=1 - axis) > 10) for axis in (0, 1))
        boxes[grey] = (rows[0], columns[0], len(rows), len(columns))
    left = boxes[50][1]
    assert left > 16 + 12 and boxes[70][1] == left  # one margin
    assert boxes[60][1:] == (left + 210, 40, 100) and boxes[80][1:] == (left + 130, 20, 50)
    assert boxes[90][1:] == (left + 260, 20, 50) and picture.shape[1] == left + 310 + 16  # one right edge
    assert boxes[70][0] == boxes[50][0] + 40 + 10 + 21  # below, after the gap and a line of text
    names = picture[boxes[50][0] : boxes[50][0] + 40, :left]
    assert (names[:20] < 99).any() and (names[20:] < 99).any() and (names[:, -12:] == 255).all()


def test_text_that_would_not_fit_is_set_smaller():
    """A caption ends before the next panel begins, however long it is."""
    long = "a caption of many words"
    picture = np.asarray(sheet([Band([(long, flat(60, 80, 200)), ("", flat(60, 80, 200))])], text=22, gap=30))[..., 0]
    above = picture[:44]
    assert (above[:, 16:96] < 128).any() and (above[:, 126:] == 255).all()


@pytest.mark.parametrize("bands, got", [([], "none"), ([Band([])], "an empty one")])
def test_a_sheet_of_nothing(bands, got):
    with pytest.raises(ValueError) as raised:
        sheet(bands)
    assert str(raised.value) == f"sheet: bands must be bands of at least one panel each, got {got}"
