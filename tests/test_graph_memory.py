"""The GPU inverse within a memory limit: parts of a batch give the bits of the whole, or an error names the bytes."""

import dataclasses
import weakref

import pytest
import torch
from compare import same_bits
from flows import random_flow
from test_graph_inverse import GUIDED, make_block, no_grad, noise, triton_device, workspace_of  # noqa: F401

from tarflow_fast.engines import memory
from tarflow_fast.engines import triton as graph
from tarflow_fast.engines.call import Call
from tarflow_fast.engines.triton import device_memory_left, invert_graph, prepare_graph, rows_together
from tarflow_fast.engines.triton_graph import GraphWorkspace
from tarflow_fast.engines.weights import inspect
from tarflow_fast.transforms import Guidance

ROWS, TOKENS = 7, 3


def bytes_of(block, rows, guided=False, batch=ROWS):
    return GraphWorkspace(inspect(block), rows, guided, torch.float32, batch=batch).nbytes


@pytest.mark.interpreter
def test_bytes_are_known_before_anything_is_allocated(triton_device):  # noqa: F811
    block = make_block().to(triton_device)
    for rows in (1, 3, ROWS):
        limit = bytes_of(block, rows, True)
        assert rows_together(inspect(block), ROWS, True, torch.float32, limit) == (rows, limit)


@pytest.mark.interpreter
def test_parts_have_the_bits_of_the_whole(triton_device):  # noqa: F811
    """Seven rows may be solved four at a time. The last part then includes a row that was solved before."""
    block = make_block(num_classes=3, flip=True, T=TOKENS).to(triton_device)
    z, y = noise(rows=ROWS, T=TOKENS).to(triton_device), torch.tensor([0, 1, 2, -1, 0, 2, 1], device=triton_device)
    whole = Call("triton")
    expected = block.invert(z, y, GUIDED, whole)
    assert workspace_of(whole).B == ROWS
    for together, parts in ((4, 2), (3, 3), (1, 7)):
        call, ticks = Call("triton", memory_limit=bytes_of(block, together, True)), []
        got = block.invert(z, y, GUIDED, call, lambda ticks=ticks: ticks.append(1))
        workspace = workspace_of(call)
        assert workspace.B == together and -(-ROWS // together) == parts and workspace.nbytes <= call.memory_limit
        assert all(map(same_bits, got, expected)), together
        assert len(ticks) == TOKENS - 1, "a token must count only once all parts have solved it"


@pytest.mark.interpreter
def test_the_parts_of_a_sample_share_one_graph(triton_device, monkeypatch):  # noqa: F811
    model, made = random_flow(img_size=(2, 4)).to(triton_device), []
    model.backend = "triton"
    noise = torch.randn(4, *model.var.shape, generator=torch.Generator().manual_seed(0)).to(triton_device)
    expected = torch.cat([model.reverse(rows) for rows in noise.split(2)])
    prepare = GraphWorkspace.prepare
    monkeypatch.setattr(GraphWorkspace, "prepare", lambda workspace: (made.append(workspace.B), prepare(workspace)))
    assert same_bits(model.sample(4, seed=0, batch_size=2), expected)
    assert made == [2]


@pytest.mark.interpreter
def test_parts_are_as_equal_as_can_be(triton_device):  # noqa: F811
    """If five of seven rows fit, there are two parts of four rows, not parts of five and two.

    If 49 of 100 rows fit, there are three parts.
    """
    block = make_block().to(triton_device)
    assert rows_together(inspect(block), ROWS, False, torch.float32, bytes_of(block, 5))[0] == 4
    assert rows_together(inspect(block), 100, False, torch.float32, bytes_of(block, 49, batch=100))[0] == 34


@pytest.mark.interpreter
def test_one_row_over_the_limit(triton_device, monkeypatch):  # noqa: F811
    """The error names the bytes that are needed. auto raises it too, because PyTorch would need no less."""
    from tarflow_fast.engines import table

    block, z = make_block(T=TOKENS).to(triton_device), noise(rows=ROWS, T=TOKENS).to(triton_device)
    one = bytes_of(block, 1)
    weights = 4 * sum(p.numel() for name, p in block.named_parameters() if name != "pos_embed")
    said = (
        rf"^block_inverse: one row needs {one:,} bytes \(weights {weights:,}, workspace {one - weights:,}\), "
        rf"over the limit of {one - 1:,}$"
    )
    with pytest.raises(MemoryError, match=said):
        block.invert(z, None, Guidance(), Call("triton", memory_limit=one - 1))
    monkeypatch.delenv("TARFLOW_FAST_BACKEND", raising=False)
    auto = dict.fromkeys(("cpu", "cuda"), ("triton", "torch"))
    monkeypatch.setattr(table, "TABLE", dataclasses.replace(table.TABLE, auto=auto))
    with pytest.raises(MemoryError, match=said):
        block.invert(z, None, Guidance(), Call(memory_limit=one - 1))
    assert block.invert(z, None, Guidance(), Call(memory_limit=one))[0].shape == z.shape


@pytest.mark.interpreter
def test_the_default_limit_is_what_the_device_has_left(triton_device, monkeypatch):  # noqa: F811
    block, z = make_block(T=TOKENS).to(triton_device), noise(rows=ROWS, T=TOKENS).to(triton_device)
    asked = []
    monkeypatch.setattr(graph, "device_memory_left", lambda device: asked.append(device) or bytes_of(block, 4))
    assert prepare_graph(inspect(block), z, Guidance()).B == ROWS and not asked, (
        "so few bytes must be taken without asking the device"
    )
    monkeypatch.setattr(memory, "UNCHECKED", 0)
    workspace = prepare_graph(inspect(block), z, Guidance())
    assert workspace.B == 4 and asked == [z.device]
    assert same_bits(
        invert_graph(block.bijection, z, None, Guidance(), workspace)[0],
        invert_graph(block.bijection, z, None, Guidance())[0],
    )
    assert prepare_graph(inspect(block), z, Guidance(), memory_limit=bytes_of(block, ROWS)).B == ROWS, (
        "the given limit must count"
    )


@pytest.mark.interpreter
def test_a_workspace_that_does_not_fit_is_released_before_the_next_is_sized(triton_device, monkeypatch):  # noqa: F811
    block, z = make_block(T=TOKENS).to(triton_device), noise(rows=ROWS, T=TOKENS).to(triton_device)
    old = prepare_graph(inspect(block), z, Guidance())
    cache, alive = weakref.ref(old.cache), []
    monkeypatch.setattr(graph, "rows_together", lambda *given: alive.append(cache()) or rows_together(*given))
    assert prepare_graph(inspect(block), z, Guidance(), old) is old and not alive
    new = prepare_graph(inspect(block), z[:2], Guidance(), old)
    assert alive == [None] and new.B == 2
    with pytest.raises(ValueError, match=r"^invert_graph: workspace must be one of this block's shapes"):
        invert_graph(block.bijection, z, None, Guidance(), old)
    assert prepare_graph(inspect(block), z, Guidance(), old).B == ROWS, "a released workspace fits no call"


def test_what_a_gpu_has_left(monkeypatch):
    """The memory left is nine tenths of the sum of the free memory and what PyTorch's own cache would give back."""
    figures = {"mem_get_info": (1000, 5000), "memory_reserved": 700, "memory_allocated": 200}
    devices = []
    for name, value in figures.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: devices.append(device) or value)
    assert device_memory_left(torch.device("cuda", 1)) == 1350
    assert set(devices) == {torch.device("cuda", 1)}


def test_what_a_cpu_has_left():
    left = device_memory_left(torch.device("cpu"))
    assert left is None or 0 < left < 2**50
