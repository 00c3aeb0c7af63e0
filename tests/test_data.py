"""Reading images: pixels are exact, classes go by name, and (seed, sample number) alone decides the order."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from training import write_image

from tarflow_fast import data


@pytest.fixture
def pictures(tmp_path):
    """(folder, its five pictures in order): random 6x6 RGB pictures, three of class cat and two of class dog."""
    pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 6, 3), dtype=np.uint8)
    names = ["cat/a.png", "cat/b.PNG", "cat/c.png", "dog/1.png", "dog/2.png"]
    for name, picture in zip(names, pixels, strict=True):
        write_image(tmp_path / name, picture)
    (tmp_path / "cat" / "notes.txt").write_text("not a picture")
    (tmp_path / ".hidden").mkdir()
    return tmp_path, torch.from_numpy(pixels).permute(0, 3, 1, 2)


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    digits, theirs = data.load_dataset("digits", 8, 1), load_digits()
    assert torch.equal(digits.images[:, 0].double(), torch.from_numpy(theirs.images))
    assert digits.images.dtype == torch.uint8 and digits.images.shape == (1797, 1, 8, 8)
    assert torch.equal(digits.labels, torch.from_numpy(theirs.target).long())
    assert digits.levels == 17 and int(digits.images.max()) == 16
    assert digits.classes == tuple("0123456789")


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ModuleNotFoundError, match=r'not installed: pip install "tarflow-fast\[demo\]"$'):
        data.load_digits()


def test_folder_keeps_pixels_and_sorts_classes(pictures):
    folder, pixels = pictures
    images = data.load_dataset(str(folder), 6, 3)
    assert torch.equal(images.images, pixels)
    assert images.labels.tolist() == [0, 0, 0, 1, 1] and images.classes == ("cat", "dog")
    assert images.levels == 256 and len(images) == 5


def test_folder_without_classes_is_unlabeled(pictures):
    folder, pixels = pictures
    images = data.load_folder(folder / "cat", (6, 6), 3)
    assert torch.equal(images.images, pixels[:3])
    assert images.labels is None and images.classes == ()
    assert images.fetch(torch.tensor([2]))[1] is None


def test_grey_is_pillows_grey(pictures):
    folder, pixels = pictures
    images = data.load_folder(folder, 6, 1)
    expected = np.stack([np.asarray(Image.fromarray(p.permute(1, 2, 0).numpy()).convert("L")) for p in pixels])
    assert np.array_equal(images.images[:, 0].numpy(), expected)


def test_centre_crop_then_antialiased_resize(tmp_path):
    stripes = np.zeros((8, 24), dtype=np.uint8)
    stripes[:, 8:16] = np.indices((8, 8)).sum(0) % 2 * 255  # the middle third is a checkerboard
    stripes[:, :8], stripes[:, 16:] = 10, 240
    path = write_image(tmp_path / "wide.png", stripes)
    whole = data.read_image(path, (8, 8), 1)
    assert np.array_equal(whole[0].numpy(), stripes[:, 8:16])
    # Without antialiasing, a checkerboard at half its size would be all black or all white.
    small = data.read_image(path, (4, 4), 1)
    assert small.shape == (1, 4, 4) and small.float().sub(127.5).abs().max() <= 32
    assert data.read_image(path, (4, 12), 1)[0, :, 0].float().sub(10).abs().max() <= 1


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a viewer must turn the picture by a quarter clockwise
    path = write_image(tmp_path / "turned.png", [[0, 100], [150, 255]], exif=exif)
    assert data.read_image(path, (2, 2), 1)[0].tolist() == [[150, 0], [255, 100]]


def test_a_set_larger_than_memory_is_decoded_when_asked(pictures):
    folder, pixels = pictures
    images = data.load_folder(folder, 6, 3, memory_limit=0)
    assert isinstance(images.images, data.ImageFiles) and len(images) == 5
    chosen, labels = images.fetch(torch.tensor([4, 0, 4]))
    assert torch.equal(chosen, pixels[[4, 0, 4]]) and labels.tolist() == [1, 0, 1]
    part = images.subset(torch.tensor([3, 1]))
    assert torch.equal(part.fetch(torch.arange(2))[0], pixels[[3, 1]]) and part.labels.tolist() == [1, 0]


def test_split_parts_the_set_the_same_way_every_time():
    digits = data.load_digits()
    kept, held_out = digits.split(0.1)
    assert len(held_out) == 180 and len(kept) == 1617
    assert torch.equal(kept.images, digits.split(0.1)[0].images)
    both = torch.cat([kept.images, held_out.images])
    assert sorted(map(bytes, both.flatten(1).numpy())) == sorted(map(bytes, digits.images.flatten(1).numpy()))
    assert len(digits.split(0.0)[1]) == 0
    with pytest.raises(ValueError, match=r"^split: holdout must be in \[0, 1\), got 1$"):
        digits.split(1)


BAD = {
    "missing": ("load_folder: there is no folder {0}/nothing (and the only built-in data set is 'digits')", "nothing"),
    "a file": ("load_folder: expected a folder of images, got the file {0}/file.png", "file.png"),
    "empty": ("load_folder: no image in {0}/empty (looked for ", "empty"),
    "an empty class": ("load_folder: class folder {0}/hollow/b holds no image", "hollow"),
    "mixed": ("load_folder: {0}/mixed holds class folders and loose images, for one loose.png", "mixed"),
    "broken": ("read_image: cannot read {0}/broken/bad.jpg as an image (UnidentifiedImageError: ", "broken"),
    "truncated": ("read_image: cannot read {0}/truncated/half.png as an image (", "truncated"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_folders_are_named(tmp_path, case):
    square = np.random.default_rng(1).integers(0, 256, (32, 32), dtype=np.uint8)
    write_image(tmp_path / "file.png", square)
    (tmp_path / "empty").mkdir()
    write_image(tmp_path / "hollow" / "a" / "1.png", square)
    (tmp_path / "hollow" / "b").mkdir()
    write_image(tmp_path / "mixed" / "a" / "1.png", square)
    write_image(tmp_path / "mixed" / "loose.png", square)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "bad.jpg").write_bytes(b"nothing of the kind")
    whole = write_image(tmp_path / "truncated" / "half.png", square).read_bytes()
    (tmp_path / "truncated" / "half.png").write_bytes(whole[: len(whole) // 2])
    message, name = BAD[case]
    with pytest.raises((ValueError, OSError)) as raised:
        data.load_folder(tmp_path / name, 8, 1)
    assert str(raised.value).startswith(message.format(tmp_path))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: data.load_digits(16), "load_digits: digits are 8x8 with 1 channel, got img_size 16 and in_channels 1"),
        (
            lambda: data.load_digits(8, 3),
            "load_digits: digits are 8x8 with 1 channel, got img_size 8 and in_channels 3",
        ),
        (lambda: data.load_folder("x", 8, 4), "load_folder: in_channels must be 1 (grey) or 3 (RGB), got 4"),
        (
            lambda: data.load_folder("x", (8, 0), 1),
            "load_folder: img_size must be a positive int or a pair (height, width), got (8, 0)",
        ),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError) as raised:
        call()
    assert str(raised.value) == message


@given(
    size=st.integers(1, 40),
    seed=st.integers(0, 5),
    start=st.integers(0, 100),
    cuts=st.lists(st.integers(0, 30), max_size=4),
)
def test_order_does_not_depend_on_how_it_is_cut(size, seed, start, cuts):
    count = sum(cuts)
    whole = data.sample_order(start, count, size, seed)
    parts, at = [], start
    for cut in cuts:
        parts.append(data.sample_order(at, cut, size, seed))
        at += cut
    assert torch.equal(whole, torch.cat(parts) if parts else whole)
    assert len(whole) == count


@pytest.mark.parametrize("size", [1, 7, 100])
def test_every_image_once_an_epoch(size):
    order = data.sample_order(0, 3 * size, size, seed=3).view(3, size)
    assert all(sorted(epoch.tolist()) == list(range(size)) for epoch in order)
    if size == 100:
        assert len({tuple(epoch.tolist()) for epoch in order}) == 3
        assert not torch.equal(order[0], data.sample_order(0, size, size, seed=4))


def test_generators_of_different_purposes_differ():
    keys = [(0, "noise", 0), (0, "noise", 1), (1, "noise", 0), (0, "order", 0)]
    draws = [torch.randn(8, generator=data.generator(*key)) for key in keys]
    assert torch.equal(draws[0], torch.randn(8, generator=data.generator(0, "noise", 0)))
    assert all(not torch.equal(draws[i], draws[j]) for i in range(4) for j in range(i))


def test_bytes_to_floats():
    assert data.to_unit(torch.tensor([0, 8, 16], dtype=torch.uint8), 17).tolist() == [-1.0, 0.0, 1.0]
    corners = data.dequantize(torch.tensor([0, 1, 255], dtype=torch.uint8), torch.tensor([0.0, 0.5, 0.0]), 256)
    assert corners.tolist() == [-1.0, 2 * 1.5 / 256 - 1, 2 * 255 / 256 - 1]


def test_dequantized_bytes_fill_the_range_evenly():
    images = torch.arange(17, dtype=torch.uint8).repeat(2000)
    x = data.dequantize(images, torch.rand(len(images)), 17)
    assert x.min() >= -1 and x.max() <= 1
    assert torch.equal(((x + 1) * 17 / 2).clamp(max=16.999).floor().byte(), images)
