"""Fast exact normalizing flows: TarFlow (arXiv 2412.06329), same weights, calls and numbers, at hardware speed."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tarflow_fast.apply import apply_to, remove_from
    from tarflow_fast.block import MetaBlock
    from tarflow_fast.flow import TokenFlow
    from tarflow_fast.model import Model, TarFlow
    from tarflow_fast.reference import ReferenceTarFlow
    from tarflow_fast.solvers.nonfinite import NonFiniteError

__version__ = "0.1.0"
__all__ = [
    "MetaBlock",
    "Model",
    "NonFiniteError",
    "ReferenceTarFlow",
    "TarFlow",
    "TokenFlow",
    "__version__",
    "apply_to",
    "remove_from",
]

_HOMES = {
    "TarFlow": "model",
    "Model": "model",
    "TokenFlow": "flow",
    "NonFiniteError": "solvers.nonfinite",
    "LogisticMixture": "transforms",
    "Spline": "transforms",
    "MetaBlock": "block",
    "ReferenceTarFlow": "reference",
    "apply_to": "apply",
    "remove_from": "apply",
}
_MODULES = {
    "flows": "flows",
    "images": "data.images",
    "info": "info",
    "made": "made",
    "native": "native",
    "reference": "reference",
    "verify": "verify",
}


def __getattr__(name: str) -> object:
    # Loaded when asked for: `tarflow-fast --help` should not wait for torch.
    import importlib

    if name in _HOMES:
        return getattr(importlib.import_module(f"tarflow_fast.{_HOMES[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"tarflow_fast.{_MODULES[name]}")
    raise AttributeError(f"module 'tarflow_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
