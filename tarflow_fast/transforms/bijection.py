"""The one-to-one map of a flow block: what engines and solvers are given instead of the block."""

from __future__ import annotations

from typing import NamedTuple

from tarflow_fast.net import CausalNet, Order
from tarflow_fast.transforms.named import Transform

__all__ = ["Bijection"]


class Bijection(NamedTuple):
    """z_{p(i+1)} = transform(x_{p(i+1)}; net(x_{p(0)} .. x_{p(i)})), and z_{p(0)} = x_{p(0)}; p is the order.

    net: tokens to parameters.  transform: what they do to a token.  order: in which the net sees the tokens.
    """

    net: CausalNet
    transform: Transform
    order: Order
