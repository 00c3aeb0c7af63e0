"""Options and fixtures of every test.

pytest --device cuda    runs the tests that take `device` on the GPU
"""

import os
import signal
import zlib

import pytest
import torch

# The workers of pytest-xdist share the cores: threads that wait for one another's cores wait whole time slices.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))

# Started in the background of a script, a process ignores Ctrl-C, and so do its children: tests that send one would
# wait.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="device of the tests that take `device`: cpu or cuda")


@pytest.fixture
def device(request):
    name = request.config.getoption("--device")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    return torch.device(name)


@pytest.fixture(autouse=True)
def seed(request):
    """Every test draws its own numbers, the same in any order and on any worker."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture
def untold(monkeypatch):
    """What is warned of once a process was not yet warned of, and the environment asks for no backend."""
    from tarflow_fast.ops.registry import warn_once

    monkeypatch.delenv("TARFLOW_FAST_BACKEND", raising=False)
    warn_once.cache_clear()
    yield
    warn_once.cache_clear()


@pytest.fixture
def threads():
    """torch.set_num_threads, put back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
