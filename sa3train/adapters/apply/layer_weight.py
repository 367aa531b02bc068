"""One adapter at one layer: the effective weight that it makes, whatever its type."""

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sa3train.adapters.adapter import Adapter
from sa3train.adapters.apply.effective_weight import (
    FactoredWeight,
    compute_effective_weight,
    compute_gains,
    factor_effective_weight,
)
from sa3train.adapters.apply.svd_basis import get_singular_basis
from sa3train.adapters.spec import BASES, BIAS_CHANGE, KINDS, PEFT_METHODS, AdapterKind, get_layer_type


@dataclass(frozen=True)
class LayerAdapter:
    """An adapter at one layer.

    Attributes:
        adapter: The adapter.
        path: Module path of the layer.
        params: The adapter's tensors at the layer, on the layer's device, with the frozen bases U and V of -xs types.
    """

    adapter: Adapter
    path: str
    params: Mapping[str, Tensor]
    _gains: "list[tuple[weakref.ref[Tensor], tuple[Tensor, Tensor]]]" = field(
        default_factory=list, repr=False, compare=False
    )

    def weight(self, W: Tensor, strength: float = 1.0) -> Tensor:
        """Compute the effective weight of this adapter alone.

        Args:
            W: The weight to adapt, (out, in) or (out, in, taps).
            strength: Factor of the low-rank product, as the released code has it: magnitudes are not scaled.

        Returns:
            The effective weight, fp32, in W's shape.
        """
        spec = self.adapter.spec
        if spec.adapter_type in PEFT_METHODS:
            from sa3train.adapters.peft_methods import merge_weight  # imports peft, which takes seconds

            W = W.float()
            merged = merge_weight(spec, self.path, W, self.params)
            return merged if strength == 1.0 else torch.lerp(W, merged, strength)
        params = {name: tensor for name, tensor in self.params.items() if name != BIAS_CHANGE}
        layer_type = get_layer_type(spec.adapter_type, self.params)
        scale = 1.0 if layer_type == "diff" else spec.get_scale(self.path)
        return compute_effective_weight(layer_type, W, params, scale * strength)

    @property
    def kind(self) -> AdapterKind | None:
        """The kind of the SA3 family that it is at this layer; None for what is more than factors and gains."""
        return KINDS.get(get_layer_type(self.adapter.spec.adapter_type, self.params))

    def factor(self, W: Tensor) -> FactoredWeight | None:
        """Compute the parts of the effective weight of this adapter alone.

        Args:
            W: The weight to adapt, unchanged since it was given before: its gains are kept while it is.

        Returns:
            Its parts; None without a `kind`.
        """
        if self.kind is None:
            return None
        scale = self.adapter.spec.get_scale(self.path)
        params = {name: tensor.to(W.device, torch.float32) for name, tensor in self.params.items()}
        if not self._gains or self._gains[0][0]() is not W:
            self._gains[:] = [(weakref.ref(W), compute_gains(self.kind, W, params, scale))]
        return factor_effective_weight(self.kind, params, scale, self._gains[0][1])

    def bias_change(self) -> Tensor | None:
        """Return the change of the layer's bias at strength 1.

        Returns:
            The change, fp32 (out,), or None when the bias stays.
        """
        change = self.params.get(BIAS_CHANGE)
        return None if change is None else change.float()


def get_layer_adapter(adapter: Adapter, path: str, W: Tensor) -> LayerAdapter:
    """Get the part of an adapter for one layer.

    Args:
        adapter: The adapter.
        path: Module path of the layer, one of `adapter.tensors`.
        W: The layer's untouched weight, which gives the device and the frozen bases.

    Returns:
        The adapter at the layer.
    """
    params = {name: tensor.to(W.device) for name, tensor in adapter.tensors[path].items()}
    kind = KINDS.get(adapter.spec.adapter_type)
    if kind is not None and kind.is_xs and not params.keys() >= set(BASES):
        trained_on = getattr(torch, adapter.metadata.get("base_dtype", ""), None)
        dtype = trained_on if isinstance(trained_on, torch.dtype) and trained_on.is_floating_point else None
        params["U"], params["V"] = get_singular_basis(W, adapter.spec.get_rank(path), dtype)
    return LayerAdapter(adapter, path, params)
