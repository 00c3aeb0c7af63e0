"""Triton kernels, imported as tarflow_fast.kernels.triton.

The letters mean the same in every file:

    B  rows of the batch          T  tokens            D  size of a token    C  channels
    H  heads                      E  size of a head    W  window             R  rows of a pass, B or 2B
    M  queries of a step, R W     N  numbers in a row of an op that works on rows

A constant BLOCK_X is the size of a program's tile along X. Kernels trust their arguments: the ops and the engine have
checked them.
"""
