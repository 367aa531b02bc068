"""Adapters in training: PEFT layers with exact norms and their gradients."""

from typing import TYPE_CHECKING

from sa3train.core.lazy import make_getattr

if TYPE_CHECKING:
    from sa3train.adapters.layers.inject import InjectedAdapter
    from sa3train.adapters.layers.peft_layers import SA3LoraLayer

__all__ = ["InjectedAdapter", "SA3LoraLayer"]  # `inject` is exported by sa3train.adapters; here it is a module
__getattr__ = make_getattr(__name__, {"InjectedAdapter": "inject", "SA3LoraLayer": "peft_layers"})
