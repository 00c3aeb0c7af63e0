"""Executes the PTX that Triton compiles, on the CPU, in numpy: a test tool for kernels on a machine without a GPU.

    parse.py        PTX text -> instructions
    kinds.py        the types of PTX and their conversions
    arithmetic.py   instructions that compute each thread's result from its own registers
    operands.py     registers, constants and addresses
    memory.py       global memory: buffers with bounds, defined bytes, and races between programs
    shared.py       shared memory: defined bytes, cp.async and its groups, and races between warps
    races.py        who touched which bytes, and what puts two accesses in order
    access.py       ld, st, atom and cp.async
    warps.py        what a warp computes together: shuffles, ldmatrix, mma.sync
    together.py     these three as instructions, and redux.sync
    decode.py       an instruction -> the function that executes it
    program.py      a kernel made ready: blocks of such functions
    group.py        programs that execute together: registers, branches, barriers
    machine.py      a launch, and the order of its programs
    launch.py       stands in for a Triton kernel: kernel[grid](...) compiles for sm_80 and executes

All threads of a group of programs execute an instruction at once, as the elements of numpy arrays. Threads that branch
differently wait for one another under masks; programs that branch differently go on as two groups.

An undefined value (of a register, of shared or of global memory) may be copied and computed with. It is a fault as soon
as it decides a branch, a predicate or an address, or reaches global memory.

What differs from a device, on purpose:

- Approximate functions (ex2, lg2, rcp, rsqrt, sqrt, division) give the correctly rounded result.
- mma.sync adds its products in float64 and rounds once. A tensor core keeps fewer bits.
- A warp executes in step. So a race inside one warp does not show.
- cp.async reads its source when it is issued, and writes when its group is waited for. A device may do both at any
  moment between.
- All warps of a program execute an instruction together. What another order would change, the tests for races report:
  two warps that touch the same bytes between two barriers, or two programs that no atomic operation puts in order.
"""
