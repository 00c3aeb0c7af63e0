"""A GPU that is not there: Triton's real JIT and the project's host path run on CPU tensors, and nothing is launched.

    with null_device(arch=90) as device:
        TarFlow(..., backend="triton").sample(16)
    device.compiled     {hash: Compiled(kernel, source, hit)}: what a GPU of this architecture would have compiled
    device.launches     how often each kernel was launched

A launch binds its arguments, specializes on them, and compiles, all as on a GPU, into Triton's cache. The cubin is not
loaded, the kernel does not run, and its outputs keep what they held. So no number that comes out means anything; what
this finds are errors of the host and of the compiler, and specializations that no test compiles. The cache that it
leaves is the one that a GPU of this architecture finds (bench/gpu_cache.py carries it there).

A CUDA graph is captured by launching once more, and replayed by counting. `compiles=False` leaves the compiler out,
which is faster by far, and records the same hashes.
"""

import contextlib
import functools
import hashlib
from collections import Counter
from itertools import count
from typing import Any, NamedTuple

import pytest
import torch

SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes of shared memory that a program may have
_ARCHITECTURE = {80: lambda device: 80, 90: lambda device: 90}
_numbers = count(100)  # of devices: Triton keeps the kernels in memory by this number, and two devices share nothing


class Compiled(NamedTuple):
    """A specialization: its result, and whether that was found in Triton's cache; None where nothing was compiled."""

    kernel: str
    source: Any
    options: dict
    result: Any
    hit: bool | None


class NullDevice:
    """What was compiled for a device, and what was launched on it."""

    def __init__(self, arch, compiles):
        self.arch, self.compiles = arch, compiles
        self.compiled, self.launches = {}, Counter()
        self.captures = self.replays = 0

    def found(self):
        """How many of the kernels were in Triton's cache."""
        return sum(bool(each.hit) for each in self.compiled.values())


class NullKernel:
    """Stands in for a compiled kernel where nothing is compiled."""

    function = packed_metadata = None

    def __init__(self, device, name):
        self.run = functools.partial(_launch, device, name)

    def launch_metadata(self, *_):
        return None


def _launch(device, name, *_):
    device.launches[name] += 1


def _driver(device):
    """The driver object that Triton asks for everything it wants of a GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    number = next(_numbers)

    class Utils:
        def get_device_properties(self, _):
            return {"max_shared_mem": SHARED[device.arch]}

        def load_binary(self, name, kernel, shared, _):
            if not kernel:
                raise RuntimeError(f"{name} has no cubin")
            return None, None, 0, 0, 1024  # module, function, registers, spills, threads that a program may have

    class NullDriver(DriverBase):
        utils = Utils()

        def is_active():
            return True

        def map_python_to_cpp_type(self, ty):
            raise NotImplementedError("no launcher is built")

        def get_current_target(self):
            return GPUTarget("cuda", device.arch, 32)

        def get_current_device(self):
            return number

        def get_current_stream(self, _):
            return 0

        def get_active_torch_device(self):
            return torch.device("cpu")

        def get_benchmarker(self):
            raise NotImplementedError("nothing can be timed")

        def launcher_cls(self, source, metadata):
            return functools.partial(_launch, device, metadata.name)

    return NullDriver()


def cache_hash(source, target, options):
    """The hash under which Triton's cache keeps this specialization."""
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.compiler import get_cache_key, make_backend

    backend = make_backend(target)
    options = backend.parse_options(dict(options) | source.parse_options())
    key = get_cache_key(source, backend, options, env_vars=get_cache_invalidating_env_vars())
    return hashlib.sha256(key.encode()).hexdigest()


def _compiler(device, compile, knobs):
    """What the JIT calls in place of `triton.compile`."""

    def record(source, target=None, options=None, _env_vars=None):
        code, hits = cache_hash(source, target, options), []
        if device.compiles:
            before = knobs.compilation.listener
            knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
            try:
                kernel = compile(source, target=target, options=options, _env_vars=_env_vars)
            finally:
                knobs.compilation.listener = before
            if kernel.hash != code:
                raise AssertionError(f"Triton keeps {source.name} under another hash than was expected")
        else:
            kernel = NullKernel(device, source.name)
        device.compiled[code] = Compiled(source.name, source, dict(options), kernel, hits[0] if hits else None)
        return kernel

    return record


class NullGraph:
    """A CUDA graph that is captured by launching, and replayed by counting."""

    def __init__(self, device):
        self.device = device

    def replay(self):
        self.device.replays += 1


@contextlib.contextmanager
def null_device(arch=90, compiles=True, capture=True):
    """Inside, Triton kernels on CPU tensors are compiled for `arch` and launched on a NullDevice, which is given.

    Args:
        arch: 80 or 90.
        compiles: whether the compiler runs.
        capture: whether the engine captures CUDA graphs, as on a GPU; else it launches the kernels of every step.
    """
    import triton.compiler
    from tarflow_fast.kernels.triton import device as kernels_device
    from triton import knobs
    from triton.runtime import driver

    from tarflow_fast.engines.triton_graph import GraphWorkspace
    from tarflow_fast.ops import registry

    device = NullDevice(arch, compiles)

    @contextlib.contextmanager
    def within(*arguments, **_):
        yield
        device.captures += isinstance(arguments[0], NullGraph)

    prepare = GraphWorkspace.prepare

    def prepare_as_on_a_gpu(workspace):
        workspace.capture = capture and not workspace.passes
        prepare(workspace)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "_active", _driver(device))
        patch.setattr(triton.compiler, "compile", _compiler(device, triton.compiler.compile, knobs))
        # These two say whether Triton runs here. They are written into the tables of all ops, so their code is changed.
        patch.setattr(registry.triton_missing.__wrapped__, "__code__", (lambda: "").__code__)
        patch.setattr(registry.triton_refuses, "__code__", (lambda device, dtype: "").__code__)
        patch.setattr(kernels_device.architecture.__wrapped__, "__code__", _ARCHITECTURE[arch].__code__)
        patch.setattr(GraphWorkspace, "prepare", prepare_as_on_a_gpu)
        graph = functools.partial(NullGraph, device)
        for name, stand_in in {"CUDAGraph": graph, "Stream": torch.device, "stream": within, "graph": within}.items():
            patch.setattr(torch.cuda, name, stand_in)
        registry.triton_missing.cache_clear()
        kernels_device.architecture.cache_clear()
        try:
            yield device
        finally:
            registry.triton_missing.cache_clear()
            kernels_device.architecture.cache_clear()
