"""Makes a bare checkout importable, without an install and without the native library.

It is also a pytest plugin (`-p gpu_bare`) that does the same. In an installed package `tarflow_fast.kernels.triton` is
mapped to the folder kernels/triton; here this module maps it.
"""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAME = "tarflow_fast.kernels.triton"
for folder in (ROOT / "tests", ROOT / "bench", ROOT):
    if str(folder) in sys.path:
        sys.path.remove(str(folder))
    sys.path.insert(0, str(folder))


def map_kernels():
    """Makes `tarflow_fast.kernels.triton` this checkout's kernels/triton, whatever else is installed."""
    import tarflow_fast.kernels

    folder = ROOT / "kernels" / "triton"
    spec = importlib.util.spec_from_file_location(
        NAME, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = tarflow_fast.kernels.triton = module
    spec.loader.exec_module(module)


map_kernels()
