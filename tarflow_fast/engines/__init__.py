"""Engines: which machine evaluates the net of a flow block, and how."""
