"""Executes a few instructions of PTX on given registers."""

import numpy as np
from ptx.machine import Launch
from ptx.parse import parse
from ptx.program import Program

FRAME = """
.visible .entry snippet(
    .param .u64 .ptr .global .align 16 buffer
)
.reqntid {threads}
{{
    .reg .pred %p<9>;
    .reg .b16 %rs<9>;
    .reg .b32 %r<99>;
    .reg .b64 %rd<9>;
    ld.param.b64 %rd1, [buffer];
    {body}
    ret;
}}
"""


def execute(body, registers=(), threads=32, programs=1, shared=0, buffer=None):
    """The registers {name: (values, which are undefined or None)} after the last instruction.

    Args:
        registers: {name: numbers of the register's bits, one for each thread or one for all}.
        buffer: bytes of global memory, whose address is in %rd1.
    """
    program = Program(parse(FRAME.format(threads=threads, body=body)))
    launch = Launch(program, (programs,), shared)
    data = np.zeros(16, np.uint8) if buffer is None else buffer
    launch.parameters.append(np.array([launch.memory.add("buffer", data)], np.uint64))
    group = launch._group(np.arange(programs))
    group.values.update(registers)
    with np.errstate(all="ignore"):
        launch._finish([group])
    return {name: (value, group.undefined.get(name)) for name, value in group.values.items()}


def f32(*x):
    return np.array(x, np.float32).view(np.uint32)


def u32(*x):
    return np.array([value & 0xFFFFFFFF for value in x], np.uint32)
