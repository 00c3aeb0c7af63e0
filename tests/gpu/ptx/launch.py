"""Stands in for a Triton kernel: kernel[grid](...) compiles it for sm_80 and executes its PTX on CPU tensors."""

import inspect

import numpy as np
import torch
from step_compile import OPTIONS, build, same, source_of

from ptx.machine import Launch
from ptx.memory import bytes_of
from ptx.parse import parse
from ptx.program import Program

ARCH = 80


class Machine:
    """Executes launches, and keeps what was compiled.

    Args:
        edit: changes the PTX of a kernel before it is read: edit(text) -> text. The tests plant errors with it.

    Attributes:
        order: a numpy Generator for a random order of programs, or None.
        executed: instructions so far, counted for each program once; calls: counted for each group of programs once.
    """

    def __init__(self, edit=None):
        self.edit, self.order, self.programs, self.unset = edit, None, {}, {}
        self.executed = self.calls = self.launches = 0

    def kernel(self, jitted):
        """What takes the place of a kernel."""
        return Emulated(self, jitted)

    def replace(self, patch, *modules):
        """Puts every kernel of these modules on this machine, with a pytest.MonkeyPatch."""
        for module in modules:
            for name in [name for name in vars(module) if name.endswith("_kernel")]:
                patch.setattr(module, name, self.kernel(inspect.unwrap(getattr(module, name))))

    def undefine(self, *tensors):
        """From now on the bytes of these tensors are undefined until a kernel writes them."""
        for tensor in tensors:
            self.unset[tensor.data_ptr()] = (tensor, np.zeros(len(bytes_of(tensor)), np.uint8))

    def all_defined(self, *tensors):
        """Whether kernels wrote every byte of tensors that were undefined."""
        return all(self.unset[tensor.data_ptr()][1].all() for tensor in tensors)

    def program(self, jitted, given, options):
        """(Program, bytes of shared memory, names of its parameters) of a specialization."""
        key = (jitted.__module__, *same((jitted, None, given, options)))
        if key not in self.programs:
            compiled = build(jitted, given, options, ARCH)
            text = compiled.asm["ptx"]
            program = Program(parse(self.edit(text) if self.edit else text))
            self.programs[key] = program, compiled.metadata.shared
        return self.programs[key]


class Emulated:
    """A kernel on a Machine."""

    def __init__(self, machine, jitted):
        self.machine, self.jitted = machine, jitted

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            names = [p.name for p in self.jitted.params]
            given = dict(zip(names, args, strict=False)) | kwargs
            options = {name: given.pop(name) for name in OPTIONS if name in given}
            return self._launch(grid, given, options)

        return launch

    def _launch(self, grid, given, options):
        machine = self.machine
        program, shared = machine.program(self.jitted, given, options)
        launch = Launch(program, grid, shared, machine.order)
        passed = [name for name, kind in source_of(self.jitted, given).signature.items() if kind != "constexpr"]
        seen = {}
        for name, (_, kind) in zip(passed, program.kernel.params, strict=False):
            value = given[name]
            if isinstance(value, torch.Tensor):
                key = value.data_ptr(), value.nbytes
                if value.device.type != "cpu":
                    raise ValueError(f"{name} must be on the CPU, got {value.device}")
                if key not in seen:
                    sharing = [other for other, x in enumerate(given[n] for n in passed) if _same_memory(x, value)]
                    unset = machine.unset.get(value.data_ptr(), (None, None))[1]
                    written = bool(program.written & set(sharing))
                    seen[key] = launch.memory.add(name, bytes_of(value), unset, written)
                parameter = np.array([seen[key]], np.uint64)
            else:
                wide = {"f32": np.float32, "u32": np.uint32, "s32": np.uint32, "u64": np.uint64, "s64": np.uint64}[kind]
                bits = value & (256 ** np.dtype(wide).itemsize - 1) if isinstance(value, int) else value
                parameter = np.array([bits]).astype(wide)
            launch.parameters.append(parameter)
        # Triton adds pointers to scratch memory, which no kernel here asks for.
        launch.parameters += [np.zeros(1, np.uint64)] * (len(program.kernel.params) - len(passed))
        launch.run()
        machine.executed += launch.executed
        machine.calls += launch.calls
        machine.launches += 1


def _same_memory(a, b):
    return isinstance(a, torch.Tensor) and a.data_ptr() == b.data_ptr() and a.nbytes == b.nbytes
