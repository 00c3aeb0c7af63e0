"""The options and fixtures that all tests share.

pytest --device cuda    runs the tests that take the fixture `device` on the GPU
"""

import os
import signal
import zlib

import pytest
import torch

# The workers of pytest-xdist share the cores. With too many threads, a thread waits whole time slices for its core.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))

# A process that a script started in the background ignores Ctrl-C, and so do its children. Tests that send Ctrl-C would
# wait for nothing.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="device of the tests that take `device`: cpu or cuda")


@pytest.fixture
def device(request):
    name = request.config.getoption("--device")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    return torch.device(name)


@pytest.fixture(autouse=True)
def seed(request):
    """Seeds each test by its name, so that it draws the same numbers in any order of tests and on any worker."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture
def fresh_warnings(monkeypatch):
    """Forgets which once-a-process warnings were given, and removes the backend that the environment asks for."""
    from tarflow_fast.ops.registry import warn_once

    monkeypatch.delenv("TARFLOW_FAST_BACKEND", raising=False)
    warn_once.cache_clear()
    yield
    warn_once.cache_clear()


@pytest.fixture
def threads():
    """Gives torch.set_num_threads, and restores the number of threads after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
