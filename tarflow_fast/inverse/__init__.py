"""How a flow block is inverted."""
