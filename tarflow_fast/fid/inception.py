"""Inception's features through torch-fidelity, whose weights are those that FID is defined with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from tarflow_fast.files import load_tensors

_LAYER = "2048"  # of the last average pooling


def inception_features(
    weights: str | Path | None = None, device: str | torch.device = "cpu"
) -> Callable[[Tensor], Tensor]:
    """The function (B, 3, H, W) uint8 -> (B, 2048) float32 of Inception v3 as FID has it (TensorFlow's of 2015-12-05).

    Images are resized to 299 x 299 by torch-fidelity, as TensorFlow 1 did.

    weights: a file of torch-fidelity's weights, read without unpickling. None: the one in torch hub's folder, which is
        downloaded there first (91 MB) where it is missing.

    Raises:
        ModuleNotFoundError, ImportError: torch-fidelity is missing or does not load.
        FileNotFoundError: there are no weights, and they cannot be downloaded; says where they were looked for.
        ValueError: the file holds something else.
    """
    try:
        from torch_fidelity import feature_extractor_inceptionv3 as library
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"fid: Inception comes with torch-fidelity, and {error.name} is not installed: "
            'pip install "tarflow-fast[fid]"'
        ) from error
    except Exception as error:  # torchvision for another build of torch raises RuntimeError at its import
        raise ImportError(
            f"fid: torch-fidelity does not load ({type(error).__name__}: {error}); "
            f"it needs the torchvision that was built for torch {torch.__version__}"
        ) from error
    path = _find_weights(weights, library.URL_INCEPTION_V3)
    names = load_tensors(path)  # torch-fidelity would unpickle it: this raises unless it holds tensors and nothing else
    if "fc.weight" not in names or "Mixed_7c.branch_pool.conv.weight" not in names:
        raise ValueError(f"fid: {path} must hold the weights of torch-fidelity's Inception v3, got other tensors")
    try:
        net = library.FeatureExtractorInceptionV3("inception-v3-compat", [_LAYER], str(path))
    except (RuntimeError, OSError) as error:
        raise ValueError(f"fid: {path} must hold the weights of torch-fidelity's Inception v3: {error}") from error
    net = net.to(device)

    def features(images: Tensor) -> Tensor:
        with torch.no_grad():
            return net(images.to(device))[0]

    return features


def _find_weights(weights: str | Path | None, url: str) -> Path:
    if weights is not None:
        path = Path(weights).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"fid: weights must be a file, got {path}; they can be had from {url}")
        return path
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path))  # whole or not at all
        except OSError as error:  # no network, no such host, refused: urllib's errors are OSErrors
            raise FileNotFoundError(
                f"fid: Inception's weights are not at {path} and cannot be downloaded ({error}): get {url} elsewhere "
                "and put it there, or name it with --fid_weights"
            ) from error
    return path
