"""Inception's features: where the weights come from, and what is said where they or their library are missing."""

import re
import sys
import types

import pytest
import torch
from fid_cases import Evil, pictures

from tarflow_fast.fid import inception_features


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)


@pytest.fixture
def library(monkeypatch, tmp_path):
    """A stand-in for torch-fidelity, and an empty folder for torch hub."""
    module = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.URL_INCEPTION_V3 = "https://example.org/weights-inception-x.pth"
    package = types.ModuleType("torch_fidelity")
    package.feature_extractor_inceptionv3 = module

    class Net(torch.nn.Module):
        def __init__(self, name, layers, path):
            super().__init__()
            assert layers == ["2048"]
            self.scale = torch.load(path)["fc.weight"]
            if self.scale.numel() != 1:
                raise RuntimeError("size mismatch for fc.weight")

        def forward(self, images):
            return (images.float().flatten(1)[:, :4] * self.scale,)

    module.FeatureExtractorInceptionV3 = Net
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", module)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return module


def weights(path, size=1):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"fc.weight": torch.full((size,), 2.0), "Mixed_7c.branch_pool.conv.weight": torch.zeros(1)}, path)


def test_inception_is_read_from_a_file_or_from_torch_hubs_folder(library, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *args: pytest.fail("downloaded"))
    images = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    weights(tmp_path / "own.pth")
    weights(tmp_path / "hub" / "checkpoints" / "weights-inception-x.pth")
    for path in (tmp_path / "own.pth", None):
        found = inception_features(path)(images)
        assert torch.equal(found, images.float().flatten(1)[:, :4] * 2) and not found.requires_grad


def test_inceptions_weights_are_downloaded_whole_or_their_place_is_named(library, tmp_path, monkeypatch):
    place = tmp_path / "hub" / "checkpoints" / "weights-inception-x.pth"

    def refuse(url, path):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    expected = f"fid: Inception's weights are not at {place} and cannot be downloaded (no network): get "
    expected += f"{library.URL_INCEPTION_V3} elsewhere and put it there, or name it with --fid_weights"
    with pytest.raises(FileNotFoundError, match=re.escape(expected)):
        inception_features()
    asked = []
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, path: asked.append(url) or weights(place))
    inception_features()
    assert asked == [library.URL_INCEPTION_V3]


def test_files_that_are_not_inception(library, tmp_path):
    weights(tmp_path / "large.pth", size=2)
    torch.save({"fc.weight": torch.zeros(1)}, tmp_path / "other.pth")
    torch.save({"fc.weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(FileNotFoundError, match=f"fid: weights must be a file, got {tmp_path}/none.pth; they can be "):
        inception_features(tmp_path / "none.pth")
    for name, message in (
        ("large.pth", "weights of torch-fidelity's Inception v3: size mismatch"),
        ("other.pth", "weights of torch-fidelity's Inception v3, got other tensors"),
        ("evil.pth", "objects other than tensors"),
    ):
        with pytest.raises(ValueError, match=message):
            inception_features(tmp_path / name)


def test_torch_fidelity_is_missing_or_does_not_load(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ModuleNotFoundError, match=re.escape('not installed: pip install "tarflow-fast[fid]"')):
        inception_features()

    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "torch_fidelity":
                raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.delitem(sys.modules, "torch_fidelity")
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(ImportError, match=r"does not load \(RuntimeError: operator torchvision::nms .* torchvision"):
        inception_features()


def test_torch_fidelitys_own_network(tmp_path):
    """The real library with drawn weights: bytes in, 2048 features out, a row a function of its image alone."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except Exception as error:
        pytest.skip(f"torch-fidelity does not load: {error}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *args, **kwargs: {}
        )
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        drawn = FeatureExtractorInceptionV3("drawn", ["2048"])
    torch.save(drawn.state_dict(), tmp_path / "weights.pth")
    images = pictures(3, channels=3).images
    features = inception_features(tmp_path / "weights.pth")
    found = features(images)
    assert found.shape == (3, 2048) and torch.equal(found, drawn(images)[0])
    torch.testing.assert_close(features(images[1:2]), found[1:2], rtol=1e-4, atol=1e-5)
