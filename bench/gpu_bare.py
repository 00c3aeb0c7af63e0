"""Makes a checkout importable that was not installed and has no native library. `-p gpu_bare` does the same for pytest.

An installation maps `tarflow_fast.kernels.triton` to the folder kernels/triton; this module does it by hand.
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
    """`tarflow_fast.kernels.triton` becomes this checkout's kernels/triton, whatever else is installed."""
    import tarflow_fast.kernels

    folder = ROOT / "kernels" / "triton"
    spec = importlib.util.spec_from_file_location(
        NAME, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = tarflow_fast.kernels.triton = module
    spec.loader.exec_module(module)


map_kernels()
