"""Every block of Python in README.md and docs/ runs. The sizes that only a published flow has are made small for it."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fid_cases import net, pictures
from flows import random_flow

from tarflow_fast import TarFlow, TokenFlow

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.M | re.S)
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"))
               if BLOCK.search(path.read_text()))  # fmt: skip
# What stands in for what is too large for a test, or is not here. Each must be found in its page.
SMALLER = {
    "README.md": {
        "TarFlow(3, 64, 2, 768, 8, 8)": "TarFlow(3, 8, 4, 64, 2, 1)",
        "1_000_000, seed=0, progress=True": "1000, seed=0",
        "epochs=20": 'epochs=1, checkpoint_every=0, device="cpu"',
    },
    "docs/dequantize.md": {'out="run"': 'out="run", epochs=1, checkpoint_every=0, device="cpu"'},
    "docs/evaluate.md": {'inception_features(device="cuda")': "net", "n=50_000": "n=24"},
    "docs/masked_flows.md": {"features=64, transforms=5, hidden_features=(256, 256)": "features=4, transforms=2"},
    "docs/windows.md": {"calibrate(16, batch_sizes=(1, 16)": "calibrate(4, batch_sizes=(1, 4)"},
}


def setting(page, folder):
    """The names that the text of a page takes for granted, and the files that it opens."""
    model = random_flow(num_classes=10)
    B, T, D = 4, *model.var.shape
    known = {"torch": torch, "TarFlow": TarFlow, "model": model, "flow": model, "images": pictures(24)}
    if page == "README.md":
        torch.save(TarFlow(3, 8, 4, 64, 2, 1).state_dict(), folder / "tarflow.pth")
        tokens = TokenFlow(num_tokens=22, token_size=3, channels=64, num_blocks=2, layers_per_block=1)
        torch.save({key.replace("mlp.main.2", "mlp.main.3"): value for key, value in tokens.state_dict().items()},
                   folder / "tarflow_Ace-A-Nme_0.pth")  # fmt: skip
    if page == "docs/evaluate.md":
        known["net"] = net
    if page == "docs/dequantize.md":
        known |= {"flow": random_flow(), "images": pictures(64).images, "pixels": pictures(4).images}
    if page == "docs/likelihood.md":
        known |= {"own": pictures(24, seed=1), "other": pictures(24, seed=2)}
    if page == "docs/windows.md":
        (folder / "runs" / "mine").mkdir(parents=True)
        known |= {"z": torch.randn(B, T, D), "y": torch.arange(B)}
    return known


def before(page, number, known):
    """Blocks of the README speak of flows that the text beside them describes."""
    if page == "README.md" and number == 1:
        known["model"] = random_flow(num_classes=10)
        known["pixels"] = pictures(16).images
    if page == "README.md" and number == 3:
        zuko = pytest.importorskip("zuko")
        known["flow"] = zuko.flows.MAF(features=4, hidden_features=(8,))
    if page == "README.md" and number == 4:
        known |= {
            "model": random_flow(num_classes=3),
            "images": pictures(64).images,
            "test_images": pictures(16).images,
        }


@pytest.mark.parametrize("page", [page for page in PAGES if page != "docs/extending.md"])
def test_every_block_runs(page, tmp_path, monkeypatch, threads):
    threads(1)
    monkeypatch.chdir(tmp_path)
    text = (ROOT / page).read_text()
    for large, small in SMALLER.get(page, {}).items():
        assert large in text, f"{page} has no {large!r} any more"
        text = text.replace(large, small)
    if "zuko" in text and page != "README.md":
        pytest.importorskip("zuko")
    known = setting(page, tmp_path)
    for number, block in enumerate(BLOCK.findall(text)):
        before(page, number, known)
        exec(compile(block, f"{page}, block {number}", "exec"), known)


def test_every_block_of_extending_runs(tmp_path):
    """In processes of their own, since they add to the tables of this one."""
    blocks = BLOCK.findall((ROOT / "docs" / "extending.md").read_text())
    assert len(blocks) == 3 and all("assert" in block for block in blocks)
    whole = "\n".join(blocks)
    done = subprocess.run([sys.executable, "-W", "error::RuntimeWarning", "-c", whole], capture_output=True, text=True,
                          cwd=ROOT)  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_picture_is_that_of_its_script():
    spec = importlib.util.spec_from_file_location("how_it_works", ROOT / "docs" / "how_it_works.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert (
        script.PATH.read_text() == script.picture()
        and "how-it-works.svg" in (ROOT / "docs/how-it-works.md").read_text()
    )


def test_no_page_is_forgotten():
    assert {"README.md", "docs/extending.md", "docs/windows.md", "docs/masked_flows.md"} <= set(PAGES)
    assert set(SMALLER) <= set(PAGES)
