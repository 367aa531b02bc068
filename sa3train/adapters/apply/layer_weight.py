"""One adapter at one layer: the effective weight it makes, whatever its kind."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sa3train.adapters.adapter import Adapter
from sa3train.adapters.apply.effective_weight import effective_weight
from sa3train.adapters.apply.svd_basis import singular_basis
from sa3train.adapters.spec import KINDS, PEFT_METHODS


@dataclass(frozen=True)
class LayerPart:
    """What an adapter holds for the layer at `path`, on the layer's device and with the bases of the -xs kinds."""

    adapter: Adapter
    path: str
    params: Mapping[str, Tensor]

    def weight(self, W: Tensor, strength: float = 1.0) -> Tensor:
        """The effective weight of this adapter alone on `W`, in fp32, with the public code's meaning of strength."""
        if self.adapter.spec.kind in PEFT_METHODS:
            from sa3train.adapters.peft_methods import merged_weight  # imports peft, which takes seconds

            W = W.float()
            merged = merged_weight(self.adapter.spec, self.path, W, self.params)
            return merged if strength == 1.0 else torch.lerp(W, merged, strength)
        return effective_weight(self.adapter.spec.kind, W, self._of_weight, self._scale * strength)

    def bias_change(self) -> Tensor | None:
        """What the adapter adds to the layer's bias at strength 1, fp32, or None."""
        change = self.params.get("diff_b")
        return None if change is None else change.float()

    @property
    def _of_weight(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self.params.items() if name != "diff_b"}

    @property
    def _scale(self) -> float:
        return 1.0 if self.adapter.spec.kind == "diff" else self.adapter.spec.scale_of(self.path)


def layer_part(adapter: Adapter, path: str, W: Tensor) -> LayerPart:
    """The part of `adapter` for the layer at `path`, whose untouched weight is `W`."""
    params = {name: tensor.to(W.device) for name, tensor in adapter.tensors[path].items()}
    kind = KINDS.get(adapter.spec.kind)
    if kind is not None and kind.xs:
        trained_on = getattr(torch, adapter.metadata.get("base_dtype", ""), None)
        dtype = trained_on if isinstance(trained_on, torch.dtype) and trained_on.is_floating_point else None
        params["U"], params["V"] = singular_basis(W, adapter.spec.rank_of(path), dtype)
    return LayerPart(adapter, path, params)
