"""Arrays, torch's data sets, photographs, folders with broken files, saved data sets: the right bytes, or one error."""

import logging
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from training import write_image

from tarflow_fast import data

RANDOM = np.random.default_rng(0)
PIXELS = RANDOM.integers(0, 256, (5, 28, 28), dtype=np.uint8)

# ---------------------------------------------------------------- arrays, tensors, torch data sets

RGB = RANDOM.integers(0, 256, (4, 6, 8, 3), dtype=np.uint8)
CHW = torch.from_numpy(RGB).permute(0, 3, 1, 2)
Y = np.array([2, 0, 1, 2])


@pytest.mark.parametrize("array", [RGB, RGB.transpose(0, 3, 1, 2), RGB / 255, (RGB / 255).astype(">f4")])
def test_arrays_in_either_order_bytes_or_floats(tmp_path, array):
    np.save(tmp_path / "x.npy", array)
    np.savez(tmp_path / "x.npz", images=array, labels=Y)
    plain, labelled = (data.load_dataset(str(tmp_path / name)) for name in ("x.npy", "x.npz"))
    assert torch.equal(plain.images, CHW) and plain.images.dtype == torch.uint8 and plain.labels is None
    assert torch.equal(labelled.images, CHW) and labelled.labels.tolist() == [2, 0, 1, 2]
    assert labelled.classes == ("0", "1", "2") and labelled.levels == 256 and labelled.shape == (3, 6, 8)


class Pairs(torch.utils.data.Dataset):
    """As torchvision's data sets are: items (image, label), names of classes."""

    classes = ("cat", "dog", "owl")

    def __init__(self, convert):
        self.convert = convert

    def __len__(self):
        return len(RGB)

    def __getitem__(self, index):
        if not 0 <= index < len(RGB):
            raise IndexError(index)
        return self.convert(RGB[index]), int(Y[index])


CONVERT = {
    "Pillow": Image.fromarray,
    "ToTensor": lambda pixels: torch.from_numpy(pixels).permute(2, 0, 1).float().div(255),
    "array": lambda pixels: pixels,
}


@pytest.mark.parametrize("convert", CONVERT)
def test_torch_data_sets(convert):
    images = data.as_images(Pairs(CONVERT[convert]))
    assert torch.equal(images.images, CHW) and images.labels.tolist() == [2, 0, 1, 2]
    assert images.classes == ("cat", "dog", "owl")
    part = data.as_images(torch.utils.data.Subset(Pairs(CONVERT[convert]), [3, 0]))
    assert torch.equal(part.images, CHW[[3, 0]]) and part.labels.tolist() == [2, 2] and part.classes == ("0", "1", "2")


def test_tensors_and_pairs_of_them():
    assert torch.equal(data.as_images(CHW).images, CHW)
    assert data.as_images((CHW, torch.from_numpy(Y))).labels.tolist() == [2, 0, 1, 2]
    assert torch.equal(data.as_images(torch.utils.data.TensorDataset(CHW)).images, CHW)
    grey = data.as_images(torch.from_numpy(PIXELS))
    assert torch.equal(grey.images[:, 0], torch.from_numpy(PIXELS)) and data.as_images(grey) is grey


VALUES = "data: images must be uint8, or floats k / 255 with whole k from 0 to 255 (ToTensor without Normalize), got "


@pytest.mark.parametrize(
    "given, error, message",
    [
        (CHW.float() / 127.5 - 1, ValueError, VALUES + "torch.float32 from -1 to 1"),
        (CHW.float(), ValueError, VALUES + "torch.float32 from 0 to "),
        (torch.full((2, 4, 4), torch.nan), ValueError, VALUES + "torch.float32 from nan to nan"),
        (CHW.long(), ValueError, VALUES + "torch.int64 from "),
        (CHW[:0], ValueError, "data: there must be at least one image and one pixel, got shape (0, 3, 6, 8)"),
        (torch.zeros(2, 5, 6, 7, dtype=torch.uint8), ValueError, "data: images must have shape (N, H, W), "),
        ((CHW, torch.arange(3)), ValueError, "data: labels must be 4 integers, one an image, got torch.int64 (3,)"),
        ((CHW, torch.arange(4) - 1), ValueError, "data: labels must be at least 0, got -1"),
        ((CHW, torch.rand(4)), ValueError, "data: labels must be 4 integers, one an image, got torch.float32 (4,)"),
        ([], ValueError, "data: there must be at least one image, got none"),
        ([RGB[0], RGB[1][:5]], ValueError, "data: all images must have one size, (3, 6, 8) like item 0, got "),
        ([(RGB[0], 1), RGB[1]], ValueError, "data: every item must have a label, or none; item 1 differs from item 0"),
        (["a", "b"], TypeError, "data: item 0 must be an image (a tensor, an array or Pillow's), got str"),
        (3, TypeError, "data: data must be a tensor, a pair (images, labels), a torch Dataset with a length"),
    ],
)  # fmt: skip
def test_data_that_cannot_be_images(given, error, message):
    with pytest.raises(error) as raised:
        data.as_images(given, "data")
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "foreign", "objects", "missing"])
def test_damaged_arrays_are_named(tmp_path, suffix, damage):
    path = tmp_path / f"x{suffix}"
    save = np.save if suffix == ".npy" else np.savez
    if damage != "missing":
        save(path, np.array([{}], dtype=object) if damage == "objects" else RGB)
    if damage in ("truncated", "empty", "foreign"):
        whole = path.read_bytes()
        path.write_bytes({"truncated": whole[:200], "empty": b"", "foreign": b"nothing of the kind"}[damage])
    with pytest.raises((ValueError, FileNotFoundError)) as raised:
        data.load_dataset(str(path))
    missing = f"load_array: path must be a file, got {path}"
    assert str(raised.value).startswith(
        missing if damage == "missing" else f"load_array: {path} is not a whole file of numbers: "
    )


def test_an_archive_without_images(tmp_path):
    np.savez(tmp_path / "x.npz", weights=RGB)
    with pytest.raises(ValueError, match=r"^load_array: .*x.npz must hold an array x or images or arr_0, got weights$"):
        data.load_array(tmp_path / "x.npz")


# ---------------------------------------------------------------- folders with broken files


def test_broken_files_are_left_out_and_counted(tmp_path, caplog):
    for i in range(4):
        write_image(tmp_path / "ab"[i // 2] / f"{i}.png", RGB[i])
    (tmp_path / "a" / "1.png").write_bytes(b"nothing of the kind")
    for memory_limit in (2**20, 0):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "tarflow_fast"):
            images = data.load_folder(tmp_path, (6, 8), 3, memory_limit)
            shown, labels = images.fetch(torch.arange(len(images)))
            images.fetch(torch.arange(len(images)))
        kept = [0, 2, 3] if memory_limit else [0, 2, 2, 3]  # decoded when asked for: the next one takes its place
        assert torch.equal(shown, CHW[kept]) and labels.tolist() == [[0, 1, 1], [0, 1, 1, 1]][memory_limit == 0]
        (line,) = caplog.messages
        assert line.startswith(f"read_image: cannot read {tmp_path}/a/1.png as an image (UnidentifiedImageError: ")
        assert line.endswith("; it is left out (1 of 4 so far)")
    with pytest.raises(ValueError, match=r"^read_image: cannot read .*/a/1.png as an image"):
        data.load_dataset(str(tmp_path), (6, 8), 3, strict=True)


@pytest.mark.parametrize("memory_limit", [2**20, 0])
def test_a_folder_of_broken_files(tmp_path, memory_limit):
    (tmp_path / "x.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"^load_folder: none of 1 images can be read, the first is .*/x.png$"):
        data.load_folder(tmp_path, 4, 3, memory_limit).fetch(torch.tensor([0]))


# ---------------------------------------------------------------- photographs

SIZES = {"astronaut": (512, 512), "chelsea": (300, 451), "coffee": (400, 600), "rocket": (427, 640)}


@pytest.fixture
def skimage(monkeypatch):
    """A stand-in for scikit-image: pictures of its sizes, each of one colour of its own."""
    package, module = types.ModuleType("skimage"), types.ModuleType("skimage.data")
    for number, (name, size) in enumerate(SIZES.items()):
        setattr(module, name, lambda size=size, n=number: np.full((*size, 3), (n, 50 + n, 100 + n), dtype=np.uint8))
    package.data = module
    monkeypatch.setitem(sys.modules, "skimage", package)
    monkeypatch.setitem(sys.modules, "skimage.data", module)


def test_photographs_hold_two_pictures_out_whole(skimage):
    images = data.load_dataset("photographs", 32, 3)
    assert images.shape == (3, 32, 32) and images.labels is None and images.levels == 256
    # crops every 16 pixels of half the size: astronaut 15 x 15, coffee 11 x 17, rocket and china 12 x 19;
    # held out: chelsea 8 x 13, flower 12 x 19
    assert (len(images), len(images.held_out)) == (225 + 187 + 2 * 228, 104 + 228)
    known, held_out = images.images[:, :, 0, 0].tolist(), images.held_out.images[:, :, 0, 0].tolist()
    assert known[:225] == [[0, 50, 100]] * 225 and known[225:412] == [[2, 52, 102]] * 187
    assert held_out[:104] == [[1, 51, 101]] * 104 and [1, 51, 101] not in known


def test_crops_are_those_of_the_picture():
    from sklearn.datasets import load_sample_image

    image = Image.fromarray(load_sample_image("china.jpg"))
    image = image.resize((320, 213), Image.Resampling.LANCZOS)
    images = data.load_photographs((24, 32), 3, ["china", "flower"])
    assert images.classes == ("china", "flower") and images.labels.tolist() == [0] * 304 + [1] * 304
    for number, (top, left) in {0: (0, 0), 1: (0, 16), 19: (12, 0), 303: (180, 288)}.items():
        expected = np.asarray(image.crop((left, top, left + 32, top + 24)))
        assert np.array_equal(images.images[number].permute(1, 2, 0).numpy(), expected)
    grey = data.load_photographs((24, 32), 1, ["china"]).images[0, 0]
    assert np.array_equal(grey.numpy(), np.asarray(image.convert("L"))[:24, :32])


def test_scikit_images_own_pictures():
    skimage = pytest.importorskip("skimage")
    images = data.load_photographs(64, 3, ["astronaut", "coffee"])
    whole = Image.fromarray(skimage.data.coffee()).resize((300, 200), Image.Resampling.LANCZOS)
    first = images.images[images.labels == 1][0].permute(1, 2, 0)
    assert np.array_equal(first.numpy(), np.asarray(whole)[:64, :64])


def test_photographs_that_cannot_be(skimage, monkeypatch):
    with pytest.raises(ValueError, match=r"must be at most 150 x 225, half of chelsea, got 200 x 200$"):
        data.load_photographs(200)
    with pytest.raises(ValueError, match=r"names must be among astronaut, .*, flower, got 'moon'$"):
        data.load_photographs(32, 3, ["moon"])
    monkeypatch.setitem(sys.modules, "skimage", None)
    monkeypatch.setitem(sys.modules, "skimage.data", None)
    with pytest.raises(
        ModuleNotFoundError, match=r'scikit-image holds astronaut and is not installed: pip install "tar'
    ):
        data.load_photographs(32)


# ---------------------------------------------------------------- Hugging Face's datasets


class ClassLabel:
    names = ["cat", "dog", "owl"]


class Saved(list):
    """A stand-in for datasets.Dataset: rows of an image and a label."""

    features = {"picture": type("Image", (), {})(), "kind": ClassLabel()}


@pytest.mark.parametrize("splits", [True, False])
def test_saved_data_sets(tmp_path, monkeypatch, splits):
    rows = [{"picture": Image.fromarray(pixels), "kind": int(y)} for pixels, y in zip(RGB, Y, strict=True)]
    saved = {"train": Saved(rows), "validation": Saved(rows[:1]), "test": Saved(rows[1:3])} if splits else Saved(rows)
    opened = []
    stand_in = types.SimpleNamespace(load_from_disk=lambda folder: opened.append(folder) or saved)
    monkeypatch.setitem(sys.modules, "datasets", stand_in)
    (tmp_path / ("dataset_dict.json" if splits else "state.json")).write_text("{}")
    images = data.load_dataset(str(tmp_path), (6, 8), 3)
    assert opened == [str(tmp_path)] and torch.equal(images.images, CHW) and images.labels.tolist() == [2, 0, 1, 2]
    assert images.classes == ("cat", "dog", "owl")
    assert images.held_out is None if not splits else torch.equal(images.held_out.images, CHW[1:3])


def test_saved_data_sets_that_cannot_be_read(tmp_path, monkeypatch):
    (tmp_path / "state.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs the package datasets: pip install datasets$"):
        data.load_dataset(str(tmp_path))

    def broken(folder):
        raise OSError("no arrow")

    for load_from_disk, message in (
        (broken, "load_saved: cannot read {0} as a saved data set (OSError: no arrow)"),
        (lambda _: {"dev": Saved()}, "load_saved: {0} must hold a split train, got dev"),
        (lambda _: Saved(), "{0}: there must be at least one image, got none"),
    ):
        monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_from_disk=load_from_disk))
        with pytest.raises(ValueError) as raised:
            data.load_dataset(str(tmp_path))
        assert str(raised.value) == message.format(tmp_path)


def test_datasets_own_files(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    rows = {"img": [Image.fromarray(pixels) for pixels in RGB], "label": Y.tolist()}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "set"))
    images = data.load_dataset(str(tmp_path / "set"))
    assert (
        torch.equal(images.images, CHW) and images.labels.tolist() == [2, 0, 1, 2] and images.classes == ("a", "b", "c")
    )
    for file in (tmp_path / "set").glob("*.arrow"):
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"^load_saved: cannot read .*/set as a saved data set \("):
        data.load_dataset(str(tmp_path / "set"))
