"""Dispatch to the Triton kernels, which live in the top-level folder kernels/."""
