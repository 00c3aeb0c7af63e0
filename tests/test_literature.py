"""docs/literature.md: every flow has its four parts and a source, and what it says of installed libraries is so."""

import importlib
import importlib.metadata
import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch

from tarflow_fast import TarFlow, TokenFlow

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "literature.md").read_text()
PARTS = ["What it is.", "In TarFlow.", "On the core.", "Library.", "Source."]
READ = [
    "TarFlow", "STARFlow", "Masked autoregressive flows", "Neural spline flows", "Flow++", "RealNVP", "Glow",
    "Invertible n x n convolutions", "DenseFlow", "Residual flows", "Attentive contractive flows",
    "Exact-Lipschitz flows", "Conformal embedding flows", "Autoencoders within flows", "Charts by vector quantisation",
    "Pseudo-invertible encoders", "Equivariant flows", "LED", "Conditional training by unconditional models",
]  # fmt: skip
LIBRARIES = ("zuko", "nflows", "normflows", "torchflows")


def sections():
    head, *parts = re.split(r"^## (.*)$", TEXT, flags=re.M)
    return head, dict(zip(parts[::2], parts[1::2], strict=True))


HEAD, SECTIONS = sections()


def test_every_flow_has_a_section_and_a_row():
    rows = re.findall(r"^\| \[(.+?)\]\(#(.+?)\) \| (.+?) \| (.+?) \|$", HEAD, flags=re.M)
    assert list(SECTIONS) == READ == [name for name, *_ in rows]
    for name, anchor, *_ in rows:
        assert anchor == re.sub(r"[^\w -]", "", name.lower()).replace(" ", "-"), name


@pytest.mark.parametrize("name", READ)
def test_a_section_has_its_four_parts_and_a_source(name):
    parts = re.findall(r"^- \*\*(.+?)\*\* (.+?)(?=^- |\Z)", SECTIONS[name], flags=re.M | re.S)
    assert [label for label, _ in parts] == PARTS
    for label, text in parts:
        text = " ".join(text.split())
        assert text.endswith(".") and (label == "Library." or text[0] == text[0].upper()), (label, text)
        assert len(text) >= (20 if label != "Library." else 10), (label, text)
    source = dict(parts)["Source."]
    papers = re.findall(r"\[arXiv\s(\S+)\]\((\S+)\)", source)
    assert all(re.fullmatch(r"\d{4}\.\d{5}", number) for number, _ in papers)
    assert all(address == f"https://arxiv.org/abs/{number}" for number, address in papers)
    assert papers or "https://" in source
    library = dict(parts)["Library."]
    assert library.strip() == "None found." or re.search(r"[\w-]+/[\w./-]+|This one", library)


def test_no_paper_is_the_source_of_two_flows():
    found = [number for text in SECTIONS.values() for number in re.findall(r"\[arXiv\s(\S+)\]", text)]
    assert len(found) == len(set(found)) >= len(READ) - 1


@pytest.mark.parametrize("library", LIBRARIES)
def test_files_of_libraries_exist(library):
    spec = importlib.util.find_spec(library)
    if spec is None:
        pytest.skip(f"{library} is not installed")
    files = set(re.findall(rf"(?<![\w/`]){library}/[\w/]+\.py", " ".join(SECTIONS.values())))
    assert files
    missing = [name for name in files if not (Path(spec.origin).parents[1] / name).is_file()]
    assert not missing


def test_names_of_this_project_exist():
    quoted = set(re.findall(r"`([^`]+)`", TEXT))
    own = {name for name in quoted if name.split("(")[0] in dir(TokenFlow) + dir(TarFlow)}
    assert {"classify", "sample_and_log_prob", "inverse(differentiable=True)"} <= own
    for path in re.findall(r"`([a-z]+/)`", TEXT):
        assert (ROOT / "tarflow_fast" / path).is_dir(), path
    assert TokenFlow(2, 1, 64, 1, 1, num_classes=3).num_classes == 3


# What the page says of torchflows 1.2.1: name in bench/peers/torchflows.py, and what the check must find.
CLAIMS = [
    ("deep sigmoid Glow", "autograd", 1000.0),
    ("Glow", "autograd", 0.1),
    ("invertible ResNet", "comes back", 0.0),
    ("residual flow", "comes back", 0.0),
]


@pytest.mark.parametrize(("name", "words", "least"), CLAIMS, ids=[name.replace(" ", "_") for name, *_ in CLAIMS])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_is_said_of_torchflows(name, words, least, threads):
    if importlib.util.find_spec("torchflows") is None or importlib.metadata.version("torchflows") != "1.2.1":
        pytest.skip("the page speaks of torchflows 1.2.1")
    threads(1)
    sys.path.insert(0, str(ROOT / "bench"))
    module = importlib.import_module("peers.torchflows")
    check = importlib.import_module("families_check").check
    peer = module.FAMILIES[name]((1, 8, 8))
    peer.begin(torch.randn(50, 1, 8, 8))
    optimizer = torch.optim.SGD(peer.parameters(), lr=1e-3)
    for _ in range(3):  # off the initial values, where two of them are nearly right
        optimizer.zero_grad()
        peer.loss(torch.randn(50, 1, 8, 8)).backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        optimizer.step()
    found = check(peer, torch.randn(1, 1, 8, 8))
    assert words in found.why and found.error > least, found
