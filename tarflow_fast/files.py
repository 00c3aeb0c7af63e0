"""Files: written whole or not at all; tensors, and nothing else, read from .safetensors, .pth, .pt and .bin."""

from __future__ import annotations

import os
import pickle
import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = ["few", "load_tensors", "save_tensors", "write_atomic"]

# What stands before the names of a flow: "module." of DDP, "net." of a Lightning module, "ema." of an average, nothing.
_OF_A_FLOW = re.compile(r"^(|.*?\.)blocks\.\d+\.(?:proj_in|proj_out|pos_embed|attn_blocks)\b")
_COUNTERS = {"n_averaged"}  # torch.optim.swa_utils.AveragedModel keeps it beside the weights


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
    """The tensors of a .safetensors file, or of a .pth / .pt / .ckpt / .bin file read with `weights_only=True`.

    What wrappers put before the names of a flow (DDP, torch.compile, Lightning, averages) is taken off.

    key: the part of the file to take: an entry that is a state_dict ("model", "state_dict"), what stands before the
        names of a flow ("net", "ema"), or both ("state_dict.teacher"). None: the only one there is.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, or holds anything but tensors (there is no fallback to unpickling); it has no
            part `key`, or none was given and there are several, or other tensors beside the flow.
        RuntimeError: a .pth under torch < 2.10, whose weights-only reader can be exploited (CVE-2026-24747).
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"load_tensors: path must be a file, got {path}")
    if path.suffix == ".safetensors":
        try:
            return _find_tensors(path, load_file(path), key)
        except SafetensorError as error:
            raise ValueError(f"load_tensors: {path} is not a whole safetensors file: {error}") from error
    if tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2]) < (2, 10):
        raise RuntimeError(f"load_tensors: {path} needs torch >= 2.10 to be read safely, got {torch.__version__}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"load_tensors: {path} holds objects other than tensors{_objects(path)} and was not unpickled"
        ) from error
    except (RuntimeError, EOFError, OSError, KeyError, ValueError, AttributeError, IndexError) as error:
        raise ValueError(f"load_tensors: {path} is not a whole torch checkpoint: {error}") from error
    return _find_tensors(path, content, key)


def few(names: Iterable[object], most: int = 3) -> str:
    """The first names of many, and how many more there are."""
    names = [str(name) for name in names]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _objects(path: Path) -> str:
    """The classes and functions a pickle asks for, in brackets, read off its opcodes: nothing of it is run."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # only a help to the reader of the error: an old or damaged file names none
        names = []
    return f" ({few(names)})" if names else ""


def _find_tensors(path: Path, content: Any, key: str | None) -> dict[str, Tensor]:
    """The dict of name -> tensor in a checkpoint: all of it, one of its entries, or what one prefix stands before."""
    expected = f"load_tensors: {path} must hold a dict of tensors (a state_dict)"
    if not isinstance(content, dict):
        raise ValueError(f"{expected}, got {type(content).__name__}")
    whole = {"": content} if _is_state_dict(content) else {}
    entries = whole or {str(name): entry for name, entry in content.items() if _is_state_dict(entry)}
    if key is not None:
        named = _named_parts(entries)
        if key not in named:
            raise ValueError(f"load_tensors: key must name a state_dict in {path}, one of {[*named]}, got {key!r}")
        return named[key]
    flows = {}
    for name, entry in entries.items():
        parts, others = _split(entry)
        flows |= {
            _label(name, prefix if len(parts) > 1 else ""): (prefix, part, others) for prefix, part in parts.items()
        }
    if not flows:
        flows = {name: ("", entry, []) for name, entry in entries.items()}
    if len(flows) > 1:
        raise ValueError(f"load_tensors: {path} holds several state_dicts, choose one with key=: {[*flows]}")
    if flows:
        ((label, (prefix, tensors, others)),) = flows.items()
        if others:
            raise ValueError(
                f"load_tensors: {path} holds {len(others)} other tensors beside the flow: {few(others)}; "
                f"key={_label(label, prefix)!r} takes the flow alone"
            )
        return tensors
    other = next(
        (f"{name!r} is of type {type(entry).__name__}" for name, entry in content.items() if not _named(name, entry)),
        "",
    )
    raise ValueError(f"{expected}, got {f'one where {other}' if other else 'an empty one'}")


def _split(tensors: dict[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Prefix -> the tensors whose names it stands before, without it, for every flow; and the names under none."""
    prefixes = {found[1] for name in tensors if (found := _OF_A_FLOW.match(name))}
    parts, others = {prefix: {} for prefix in sorted(prefixes)}, []
    for name, tensor in tensors.items():
        prefix = max((prefix for prefix in prefixes if name.startswith(prefix)), key=len, default=None)
        if prefix is not None:
            parts[prefix][name.removeprefix(prefix)] = tensor
        elif name not in _COUNTERS:
            others.append(name)
    return parts, others


def _named_parts(entries: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """What `key` may say -> the tensors."""
    named = {}
    for name, entry in entries.items():
        parts, _ = _split(entry)
        if name and len(parts) < 2:
            named[name] = next(iter(parts.values()), entry)
        named |= {_label(name, prefix): part for prefix, part in parts.items() if prefix or len(parts) > 1}
    return named


def _label(name: str, prefix: str) -> str:
    return ".".join(part for part in (name, prefix.rstrip(".")) if part)


def _named(name: object, entry: object) -> bool:
    return isinstance(name, str) and isinstance(entry, Tensor)


def _is_state_dict(entry: object) -> bool:
    return isinstance(entry, dict) and bool(entry) and all(_named(*item) for item in entry.items())
