"""Inputs that need not be kept: those that can be made again from what autograd keeps for the step before.

An adapter needs its layer's input in the backward pass. When that input is a product a·b or silu(a), the multiplication
before it keeps a and b anyway, so keeping them costs nothing and the input is multiplied again, to the same bits.
The step before may also say itself how: an autograd Function with a `remake` takes its own saved tensors, as the norms
of `models.norms` do.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Recipe:
    """How to make a tensor again: `make(sources)`."""

    make: Callable[[Sequence[Tensor]], Tensor]
    sources: tuple[Tensor, ...]


def recipe_of(x: Tensor, norms: bool = True) -> Recipe | None:
    """A recipe for `x` from tensors that its own autograd node keeps, or None when there is none.

    A norm takes several passes to make again, a product one; without `norms` only what takes one has a recipe.

    None too while saved tensors are packed by hooks (activation checkpointing, offloading): unpacking would undo that.
    """
    node: Any = x.grad_fn  # torch declares only what all nodes have
    if node is None or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return None
    if norms and hasattr(node, "remake"):
        return Recipe(node.remake, tuple(source.detach() for source in node.saved_tensors))
    if node.name() == "MulBackward0":
        return _of(_product, node, "_saved_self", "_saved_other")
    if node.name() == "SiluBackward0":
        return _of(_silu, node, "_saved_self")
    return None


def _of(make: Callable[[Sequence[Tensor]], Tensor], node: object, *names: str) -> Recipe | None:
    sources = tuple(getattr(node, name) for name in names)
    if not all(isinstance(source, Tensor) for source in sources):
        return None
    return Recipe(make, tuple(source.detach() for source in sources))


def _product(sources: Sequence[Tensor]) -> Tensor:
    return sources[0] * sources[1]


def _silu(sources: Sequence[Tensor]) -> Tensor:
    return F.silu(sources[0])
