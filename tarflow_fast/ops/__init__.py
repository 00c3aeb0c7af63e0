"""Ops: one op, one file, with its formula, plain PyTorch reference, gradient and the table of its backends."""

from tarflow_fast.ops.affine import affine, affine_ref
from tarflow_fast.ops.block_inverse import block_inverse
from tarflow_fast.ops.registry import explain

__all__ = ["affine", "affine_ref", "block_inverse", "explain"]
