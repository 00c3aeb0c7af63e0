"""Triton kernels, imported as tarflow_fast.kernels.triton."""
