"""The floors of the house (pyproject.toml, CONTRIBUTING.md): nothing imports upwards, nothing imports in a circle."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
grimp = pytest.importorskip("grimp")


def test_a_floor_imports_only_from_those_below():
    done = subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-cache"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 kept, 0 broken" in done.stdout


@pytest.fixture(scope="module")
def imports():
    graph = grimp.build_graph("tarflow_fast", exclude_type_checking_imports=True, cache_dir=None)
    return {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}


def test_no_circle(imports):
    """Packages count as their __init__: a module may be imported by its package, or import it, and not both."""
    done, path = set(), []

    def visit(module):
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module in done:
            return
        path.append(module)
        for below in sorted(imports.get(module, ())):
            visit(below)
        path.pop()
        done.add(module)

    for module in imports:
        visit(module)
    assert len(done) > 40


def test_rooms_stay_small():
    files = [*(ROOT / "tarflow_fast").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    files += [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cpp", ".h", ".cu", ".cuh")]
    long = {str(path.relative_to(ROOT)): n for path in files if (n := len(path.read_text().splitlines())) > 400}
    assert not long
    assert len([*(ROOT / "tarflow_fast").glob("*.py")]) <= 20
