"""IDX files and Fashion-MNIST: the right bytes, wherever they lie, or one clear error."""

import gzip
import struct

import numpy as np
import pytest
import torch

from tarflow_fast import data
from tarflow_fast.data import load

RANDOM = np.random.default_rng(0)
PIXELS = RANDOM.integers(0, 256, (5, 28, 28), dtype=np.uint8)
LABELS = np.array([9, 0, 0, 3, 7], dtype=np.uint8)


def idx(array) -> bytes:
    """An IDX file, from the format's description: 0, 0, 8 (unsigned byte), dimensions, big-endian sizes, bytes."""
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def mnist(folder, compress=False, pixels=PIXELS, labels=LABELS):
    """The four files of MNIST in a folder: everything to train on, the last two images as the test part."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"train": (pixels, labels), "t10k": (pixels[-2:], labels[-2:])}
    for name, (images, y) in parts.items():
        for kind, array in (("images-idx3-ubyte", images), ("labels-idx1-ubyte", y)):
            content = idx(array)
            path = folder / f"{name}-{kind}{'.gz' if compress else ''}"
            path.write_bytes(gzip.compress(content) if compress else content)
    return folder


def check_fashion(images):
    assert torch.equal(images.images, torch.from_numpy(PIXELS)[:, None]) and images.labels.tolist() == [9, 0, 0, 3, 7]
    assert torch.equal(images.held_out.images, torch.from_numpy(PIXELS[-2:])[:, None])
    assert images.held_out.labels.tolist() == [3, 7] and images.held_out.classes == images.classes
    assert images.levels == 256 and images.classes[9] == "Ankle boot" and len(images.classes) == 10


@pytest.mark.parametrize("place", ["", "FashionMNIST/raw", "debian"])
@pytest.mark.parametrize("compress", [False, True])
def test_fashion_mnist_is_found_in_three_places(tmp_path, monkeypatch, place, compress):
    monkeypatch.setattr(load, "DEBIAN", tmp_path / "debian")
    mnist(tmp_path / (place if place == "debian" else f"root/{place}"), compress)
    check_fashion(data.load_dataset("fashion-mnist", 28, 1, data_root=tmp_path / "root"))
    known, held_out = data.load_dataset("fashion-mnist", data_root=tmp_path / "root").split(0.0)
    assert (len(known), len(held_out)) == (5, 2) and known.held_out is None
    assert [len(part) for part in data.load_fashion_mnist(tmp_path / "root").split(0.4)] == [3, 2]


def test_the_first_place_wins_and_damage_there_is_no_reason_to_look_on(tmp_path, monkeypatch):
    monkeypatch.setattr(load, "DEBIAN", mnist(tmp_path / "debian", pixels=255 - PIXELS))
    root = mnist(tmp_path / "root")
    check_fashion(data.load_fashion_mnist(root))
    (root / "train-images-idx3-ubyte").write_bytes(b"")
    with pytest.raises(ValueError, match="train-images-idx3-ubyte must begin with 00 00 08 03"):
        data.load_fashion_mnist(root)


def test_absent_fashion_mnist_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(load, "DEBIAN", tmp_path / "debian")
    with pytest.raises(FileNotFoundError) as raised:
        data.load_fashion_mnist(tmp_path)
    assert str(raised.value) == (
        f"load_fashion_mnist: there is no train-images-idx3-ubyte, gzipped or not, in {tmp_path}, "
        f"{tmp_path}/FashionMNIST/raw, {tmp_path}/debian. Get it with `apt install dataset-fashion-mnist` (Debian, "
        f"Ubuntu), or with `torchvision.datasets.FashionMNIST('{tmp_path}', download=True)`, or name its folder with "
        "--data-root"
    )
    assert not [*tmp_path.iterdir()]


@pytest.mark.skipif(not load.DEBIAN.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_debians_fashion_mnist():
    images = data.load_fashion_mnist()
    assert images.shape == (1, 28, 28) and (len(images), len(images.held_out)) == (60000, 10000)
    assert images.labels[:5].tolist() == [9, 0, 0, 3, 0] and images.held_out.labels[:3].tolist() == [9, 2, 1]
    assert images.labels.bincount().tolist() == [6000] * 10 and int(images.images[0].sum()) == 76247


def test_an_idx_folder_and_an_idx_file_by_path(tmp_path):
    folder = mnist(tmp_path / "letters", labels=LABELS % 4)
    whole = data.load_dataset(str(folder), 28, 1)
    assert (
        whole.classes == ("0", "1", "2", "3") and whole.labels.tolist() == [1, 0, 0, 3, 3] and len(whole.held_out) == 2
    )
    one = data.load_dataset(str(folder / "train-images-idx3-ubyte"))
    assert torch.equal(one.images, whole.images) and torch.equal(one.labels, whole.labels) and one.held_out is None
    (tmp_path / "alone.idx.gz").write_bytes(gzip.compress(idx(PIXELS)))
    alone = data.load_dataset(str(tmp_path / "alone.idx.gz"))
    assert torch.equal(alone.images, whole.images) and alone.labels is None and alone.classes == ()


IDX = {
    "empty": (b"", "must begin with 00 00 08 03 (unsigned bytes, 3 sizes), got an empty file"),
    "wrong magic": (idx(LABELS), "must begin with 00 00 08 03 (unsigned bytes, 3 sizes), got 00 00 08 01"),
    "a picture": (b"\x89PNG\r\n", "must begin with 00 00 08 03 (unsigned bytes, 3 sizes), got 89 50 4e 47"),
    "header cut": (idx(PIXELS)[:10], "must have a header of 16 bytes, got 10 bytes in all"),
    "truncated": (idx(PIXELS)[:-1], "must hold 3920 bytes after its header (5 x 28 x 28), got 3919"),
    "too long": (idx(PIXELS) + b"1", "must hold 3920 bytes after its header (5 x 28 x 28), got 3921"),
    "no image": (idx(PIXELS[:0]), "must hold at least one item, got sizes 0 x 28 x 28"),
    "gzip cut": (gzip.compress(idx(PIXELS))[:-9], "must be a whole gzip file, got a damaged one (Compressed "),
    "gzip flipped": (
        gzip.compress(idx(PIXELS))[:-8] + b"12345678", "must be a whole gzip file, got a damaged one (CRC check failed"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", IDX)
def test_bad_idx_files_are_named(tmp_path, case):
    content, message = IDX[case]
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(ValueError) as raised:
        data.load_dataset(str(path))
    assert str(raised.value).startswith(f"read_idx: {path} {message}")
    assert [*tmp_path.iterdir()] == [path]


def test_idx_files_that_do_not_fit_together(tmp_path):
    images = tmp_path / "x.idx"
    images.write_bytes(idx(PIXELS))
    labels = tmp_path / "y.idx"
    labels.write_bytes(idx(LABELS[:4]))
    with pytest.raises(ValueError, match=r"^load_idx: .*/y.idx must hold a label for each of 5 images, got 4$"):
        data.load_idx(images, labels)
    labels.write_bytes(idx(LABELS))
    with pytest.raises(ValueError, match=r"^load_idx: the labels in .*/y.idx must be below 2, got 9$"):
        data.load_idx(images, labels, ("a", "b"))
    folder = mnist(tmp_path / "set")
    (folder / "t10k-images-idx3-ubyte").write_bytes(idx(PIXELS[-2:, :, :20].copy()))
    with pytest.raises(ValueError, match=r"images of 28 x 28 with labels, got images of 28 x 20 with labels$"):
        data.load_idx_folder(folder)
    with pytest.raises(
        ValueError, match=r"^load_dataset: .* must be 32 x 32 with 1 channels as asked for, got 28 x 28"
    ):
        data.load_dataset(str(images), 32, 1)
