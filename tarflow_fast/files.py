"""Files: written whole or not at all; tensors, and nothing else, read from .safetensors, .pth, .pt and .bin."""

from __future__ import annotations

import os
import pickle
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = ["load_tensors", "save_tensors", "write_atomic"]

_WRAPPER_PREFIXES = re.compile(r"^((module|_orig_mod)\.)+")


def write_atomic(path: str | Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, then fsync and rename it there: whole or not at all."""
    path = Path(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp made it private; a new file would have had the process's mode
        _fsync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _fsync(path.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_tensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all. Tensors are copied, so views and shared memory are no trouble."""
    copies = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    write_atomic(path, lambda temporary: save_file(copies, temporary, metadata={"format": "pt", **(metadata or {})}))


def load_tensors(path: str | Path, key: str | None = None) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a .pth / .pt / .bin file read with `weights_only=True`.

    key: of the file's entries, the one that holds the state_dict; None: the file is one, or has one for an entry.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, or holds anything but tensors (there is no fallback to unpickling); it has no
            entry `key`, or none was given and several are state_dicts.
        RuntimeError: a .pth under torch < 2.10, whose weights-only reader can be exploited (CVE-2026-24747).
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"load_tensors: path must be a file, got {path}")
    if path.suffix == ".safetensors":
        try:
            return _strip(load_file(path))
        except SafetensorError as error:
            raise ValueError(f"load_tensors: {path} is not a whole safetensors file: {error}") from error
    if tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2]) < (2, 10):
        raise RuntimeError(f"load_tensors: {path} needs torch >= 2.10 to be read safely, got {torch.__version__}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"load_tensors: {path} holds objects other than tensors and was not unpickled") from error
    except (RuntimeError, EOFError, OSError, KeyError, ValueError, AttributeError, IndexError) as error:
        raise ValueError(f"load_tensors: {path} is not a whole torch checkpoint: {error}") from error
    return _find_tensors(path, content, key)


def _strip(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {_WRAPPER_PREFIXES.sub("", key): value for key, value in tensors.items()}


def _find_tensors(path: Path, content: Any, key: str | None) -> dict[str, Tensor]:
    """The dict of name -> tensor in a checkpoint: the whole of it, or one of its entries."""
    expected = f"load_tensors: {path} must hold a dict of tensors (a state_dict)"
    if not isinstance(content, dict):
        raise ValueError(f"{expected}, got {type(content).__name__}")
    inside = {name: _strip(entry) for name, entry in content.items() if _is_state_dict(entry)}
    if key is not None:
        if key not in inside:
            raise ValueError(f"load_tensors: key must name a state_dict in {path}, one of {[*inside]}, got {key!r}")
        return inside[key]
    if _is_state_dict(content):
        return _strip(content)
    flows = {name: tensors for name, tensors in inside.items() if "var" in tensors} or inside
    if len(flows) > 1:
        raise ValueError(f"load_tensors: {path} holds several state_dicts, choose one with key=: {[*flows]}")
    if flows:
        return next(iter(flows.values()))
    other = next(
        (f"{name!r} is of type {type(entry).__name__}" for name, entry in content.items() if not _named(name, entry)),
        "",
    )
    raise ValueError(f"{expected}, got {f'one where {other}' if other else 'an empty one'}")


def _named(name: object, entry: object) -> bool:
    return isinstance(name, str) and isinstance(entry, Tensor)


def _is_state_dict(entry: object) -> bool:
    return isinstance(entry, dict) and bool(entry) and all(_named(*item) for item in entry.items())
