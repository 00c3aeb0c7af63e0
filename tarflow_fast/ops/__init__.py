"""Ops: one file an op."""
