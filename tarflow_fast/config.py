"""The arguments of a flow's constructor: checked once, a line each, and as JSON can hold them."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from operator import index
from typing import Any

from tarflow_fast.files import few
from tarflow_fast.net import HEAD_SIZE, Order
from tarflow_fast.transforms import settle_transform
from tarflow_fast.validate import check_positive_int

__all__ = ["FlowConfig", "TarFlowConfig", "check_img_size"]


def check_img_size(where: str, img_size: object) -> tuple[int, int]:
    """img_size, an int or a pair (height, width), as a pair of ints of at least 1."""
    pair = tuple(img_size) if isinstance(img_size, (tuple, list)) and len(img_size) == 2 else (img_size, img_size)
    return tuple(check_positive_int(where, "img_size", side) for side in pair)


def _checked(config: Any, where: str, least: dict[str, int]) -> dict[str, int]:
    return {name: check_positive_int(where, name, getattr(config, name), minimum) for name, minimum in least.items()}


def _values(config: Any) -> dict[str, Any]:
    """Its fields; the transform only where nvp does not tell it, so that files of other flows are as they were."""
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    return {name: value for name, value in values.items() if name != "transform" or value is not None}


_SIZES = {"channels": 1, "num_blocks": 1, "layers_per_block": 1, "num_classes": 0}


@dataclass(frozen=True)
class FlowConfig:
    """Of `TokenFlow`; its docstring says what each is."""

    num_tokens: int
    token_size: int
    channels: int
    num_blocks: int
    layers_per_block: int
    head_size: int = HEAD_SIZE
    expansion: int = 4
    nvp: bool = True
    num_classes: int = 0
    orders: tuple[tuple[int, ...], ...] | None = None
    transform: str | None = None  # once checked, None where nvp tells it

    def checked(self, where: str) -> FlowConfig:
        """The same with plain ints and tuples.

        Raises:
            TypeError, ValueError: an argument is of the wrong type, not positive, or does not divide as it must; orders
                are not num_blocks permutations of range(num_tokens).
        """
        least = {"num_tokens": 1, "token_size": 1, "head_size": 1, "expansion": 1} | _SIZES
        transform, nvp = settle_transform(where, self.transform, self.nvp)
        config = replace(self, transform=transform, nvp=nvp, **_checked(self, where, least))
        if config.channels % config.head_size:
            raise ValueError(f"{where}: channels must be a multiple of {config.head_size}, got {config.channels}")
        return config if config.orders is None else replace(config, orders=config._check_orders(where))

    def _check_orders(self, where: str) -> tuple[tuple[int, ...], ...]:
        orders, T, K = self.orders, self.num_tokens, self.num_blocks
        orders = orders.tolist() if hasattr(orders, "tolist") else orders
        if not isinstance(orders, Sequence) or len(orders) != K:
            got = len(orders) if isinstance(orders, Sequence) else type(orders).__name__
            raise ValueError(f"{where}: orders must be num_blocks = {K} permutations of range({T}), got {got}")
        checked = []
        for number, order in enumerate(orders):
            try:
                checked.append(tuple(Order(T, places=iter(order)).places))
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"{where}: orders[{number}] must be a permutation of range({T}), got {_told(order, T)}"
                ) from error
        return tuple(checked)

    def json(self) -> dict[str, Any]:
        """As `TokenFlow(**...)` takes it."""
        return _values(self) | {"orders": None if self.orders is None else [list(order) for order in self.orders]}


def _told(order: Any, T: int) -> str:
    """What is wrong with an order, without all of its T numbers."""
    try:
        count, lacking = len(order), sorted(set(range(T)) - {index(place) for place in order})
    except TypeError:
        return reprlib.repr(order)
    if count != T:
        return f"{count} numbers"
    return f"one without {few(lacking)}" if lacking else reprlib.repr(order)


@dataclass(frozen=True)
class TarFlowConfig:
    """Of `TarFlow`; its docstring says what each is."""

    in_channels: int
    img_size: int | tuple[int, int]
    patch_size: int
    channels: int
    num_blocks: int
    layers_per_block: int
    nvp: bool = True
    num_classes: int = 0
    transform: str | None = None  # once checked, None where nvp tells it

    def checked(self, where: str) -> TarFlowConfig:
        """The same with plain ints, and img_size a pair only where it is not square.

        Raises:
            TypeError, ValueError: an argument is of the wrong type, not positive, or does not divide as it must.
        """
        sizes = _checked(self, where, {"in_channels": 1, "patch_size": 1} | _SIZES)
        height, width = check_img_size(where, self.img_size)
        patch_size = sizes["patch_size"]
        if height % patch_size or width % patch_size:
            raise ValueError(f"{where}: img_size must be a multiple of patch_size = {patch_size}, got {self.img_size}")
        transform, nvp = settle_transform(where, self.transform, self.nvp)
        size = height if height == width else (height, width)
        return replace(self, transform=transform, nvp=nvp, img_size=size, **sizes)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across."""
        height, width = check_img_size("TarFlow", self.img_size)
        return height // self.patch_size, width // self.patch_size

    @property
    def tokens(self) -> FlowConfig:
        """The flow over tokens below: T patches of size D."""
        rows, columns = self.grid
        sizes = rows * columns, self.in_channels * self.patch_size**2
        below = self.channels, self.num_blocks, self.layers_per_block
        return FlowConfig(*sizes, *below, nvp=self.nvp, num_classes=self.num_classes, transform=self.transform)

    def json(self) -> dict[str, Any]:
        """As `TarFlow(**...)` takes it."""
        return _values(self) | {"img_size": self.img_size if isinstance(self.img_size, int) else list(self.img_size)}
