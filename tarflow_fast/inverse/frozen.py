"""Packed weights kept between calls, for a model whose weights are promised to stay as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from tarflow_fast import native
from tarflow_fast.inverse.classes import class_table
from tarflow_fast.inverse.eligibility import Weights, inspect
from tarflow_fast.inverse.plan import Plan, Sizes

if TYPE_CHECKING:
    from tarflow_fast.block import MetaBlock

__all__ = ["FrozenBlocks"]


class FrozenBlocks:
    """The weights of a model's blocks as they were found, and a plan for each block and precision, packed once.

    What PyTorch counts (in-place operations, optimizers, `load_state_dict`), other memory (`.to()`) and other blocks
    are noticed at the next use; hooks, replaced layers and what is written through `.data` are not.

    Args:
        blocks: those of the model.

    Raises:
        RuntimeError: the native engine is not there, or cannot take a block; the reason is named.
    """

    def __init__(self, blocks: Sequence[MetaBlock]) -> None:
        if not native.available():
            raise RuntimeError(f"freeze: there is no native CPU engine to keep weights for: {native.reason()}")
        self._found: dict[int, tuple[MetaBlock, Weights, list[tuple[int, int]]]] = {}
        self._plans: dict[tuple[int, int], Plan] = {}  # by block and precision
        self._tables: dict[int, Tensor | None] = {}
        for number, block in enumerate(blocks):
            weights = inspect(block)
            if isinstance(weights, str):
                raise RuntimeError(f"freeze: the native CPU engine cannot take block {number}: {weights}")
            self._found[id(block)] = block, weights, _state(block, weights)

    def __deepcopy__(self, memo: object) -> None:
        """A copy of the model has weights of its own: it is not frozen."""

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()

    def weights(self, block: MetaBlock) -> Weights:
        """What `inspect(block)` found.

        Raises:
            RuntimeError: the block is another, or a weight has changed.
        """
        _, weights, state = self._found.get(id(block), (None, None, None))
        if weights is None:
            raise RuntimeError(f"{_CHANGED}: a block was replaced; {_REMEDY}")
        now = _state(block, weights)
        if now != state:
            names = ["class_embed", *(weights.name(k) for k in range(len(weights.tensors)))]
            name = next(name for name, old, new in zip(names, state, now, strict=True) if old != new)
            raise RuntimeError(f"{_CHANGED}: {name} of a block is not what it was; {_REMEDY}")
        return weights

    def plan(self, block: MetaBlock, sizes: Sizes, weights: Weights) -> Plan:
        """The block's packed weights. They are only read from then on, by any number of calls at once."""
        plan = self._kept(block, sizes)
        if plan is None:
            plan = self._plans[id(block), sizes.precision] = Plan.of(sizes).pack(weights)
        return plan

    def class_table(self, block: MetaBlock) -> Tensor | None:
        """Its class embeddings and their mean, only to be read."""
        if id(block) not in self._tables:
            self._tables[id(block)] = class_table(block)
        return self._tables[id(block)]

    def bytes(self) -> int:
        """What the plans made so far take."""
        return sum(plan.bytes for plan in [*self._plans.values()])

    def bytes_with(self, block: MetaBlock, sizes: Sizes) -> int:
        """The same when this block's is made."""
        return self.bytes() + (Plan.bytes_of(sizes) if self._kept(block, sizes) is None else 0)

    def _kept(self, block: MetaBlock, sizes: Sizes) -> Plan | None:
        plan = self._plans.get((id(block), sizes.precision))
        return plan if plan is not None and plan.usable else None  # one made before a fork is not


_CHANGED, _REMEDY = "reverse: the model was changed after freeze()", "call freeze() again, or unfreeze()"


def _state(block: MetaBlock, weights: Weights) -> list[tuple[int, int] | None]:
    """What tells most changes of a tensor: PyTorch's count of writes, and where it lies."""
    return [None if t is None else (_version(t), t.data_ptr()) for t in (block.class_embed, *weights.tensors)]


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
