"""The SA3 adapter family as PEFT layers. Their forward pass never builds a weight-sized Δ; see `fused_linear`.

Shape suffixes: B batch, T tokens (or frames), I columns (in, or in·taps), O rows (out), R rank.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import PeftType
from torch import Tensor, nn

from sa3train.adapters.apply.effective_weight import init_parameters
from sa3train.adapters.apply.svd_basis import get_singular_basis
from sa3train.adapters.layers.batched_linear import BatchedAdapter, BatchedProduct, is_launch_bound
from sa3train.adapters.layers.batched_norms import LayerState
from sa3train.adapters.layers.frozen_weight import FrozenWeight
from sa3train.adapters.layers.fused_linear import AdaptedProduct, FrozenInputs, find_recomputation
from sa3train.adapters.spec import KINDS, AdapterKind, AdapterSpec

TRAINED = ("lora_A", "lora_B", "M_xs", "magnitude", "magnitude_r", "magnitude_c")


class _FrozenBases(nn.Module):
    """Tensors by adapter name that move with the module and are neither trained nor saved."""

    def __contains__(self, name: str) -> bool:
        return name in dict(self.named_buffers())

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = getattr(self, name)
        return tensor

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        self.register_buffer(name, tensor, persistent=False)

    def __delitem__(self, name: str) -> None:
        delattr(self, name)


class SA3LoraLayer(nn.Module, BaseTunerLayer):
    """A Linear or Conv1d with one adapter of the SA3 family.

    The adapter's parameters are fp32 whatever the base's dtype. With adapters disabled the base layer runs as it is.

    Args:
        base_layer: The layer to adapt.
    """

    adapter_layer_names = TRAINED
    lora_A: nn.ParameterDict
    lora_B: nn.ParameterDict
    M_xs: nn.ParameterDict
    magnitude: nn.ParameterDict
    magnitude_r: nn.ParameterDict
    magnitude_c: nn.ParameterDict
    other_param_names = ("basis_U", "basis_V", "scaling", "kinds", "dropout")

    def __init__(self, base_layer: nn.Linear | nn.Conv1d) -> None:
        super().__init__()
        self.base_layer = base_layer
        for name in TRAINED:
            setattr(self, name, nn.ParameterDict())
        self.basis_U, self.basis_V = _FrozenBases(), _FrozenBases()
        self.scaling: dict[str, float] = {}
        self.kinds: dict[str, AdapterKind] = {}
        self.dropout: dict[str, float] = {}
        self.merged_adapters: list[str] = []
        self._frozen: dict[str, FrozenWeight] = {}
        self.batched: dict[str, BatchedAdapter] = {}

    def update_layer(self, adapter_name: str, spec: AdapterSpec, path: str) -> None:
        """Add an adapter that leaves the layer's output as it is.

        Args:
            adapter_name: Name of the adapter.
            spec: Its settings.
            path: Module path of this layer, for its rank and scale.
        """
        kind, rank, weight = KINDS[spec.adapter_type], spec.get_rank(path), self.base_layer.weight
        for name, tensor in init_parameters(kind, weight, rank).items():
            getattr(self, name)[adapter_name] = nn.Parameter(tensor)
        if kind.is_xs:
            self.basis_U[adapter_name], self.basis_V[adapter_name] = get_singular_basis(weight, rank)
        self.scaling[adapter_name] = spec.get_scale(path)
        self.kinds[adapter_name] = kind
        self.dropout[adapter_name] = spec.dropout
        self.set_adapter(self.active_adapters)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the adapted layer's output, in the base's dtype."""
        active = [name for name in self.active_adapters if name in self.kinds]
        if self.disable_adapters or not active:
            return self.base_layer(x, *args, **kwargs)
        if len(active) > 1:
            raise RuntimeError(f"Only one adapter can be trained at a time, but {active} are active.")
        x = x.to(self.base_layer.weight.dtype)
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return self._run_unfolded(x, active[0])
        return self._run_unfolded(x, active[0])

    def _run_unfolded(self, x: Tensor, name: str) -> Tensor:
        if isinstance(self.base_layer, nn.Conv1d):
            return self._run_adapted(unfold_conv_input(self.base_layer, x), name).transpose(1, 2)
        return self._run_adapted(x, name)

    def _run_adapted(self, x: Tensor, name: str) -> Tensor:
        kind = self.kinds[name]
        frozen = self._get_frozen(name)
        A_RI, M_or_B = self._get_factors(name)
        magnitude_O = (self.magnitude_r if kind.scales_columns else self.magnitude)[name] if kind.scales_rows else None
        magnitude_I = (self.magnitude_c if kind.scales_rows else self.magnitude)[name] if kind.scales_columns else None
        rate = self.dropout[name] if self.training else 0.0
        x_TI = x.reshape(-1, x.shape[-1])
        dropped_TI = F.dropout(x_TI, rate) if rate else None
        bias = self.base_layer.bias
        fixed = FrozenInputs(frozen, None if bias is None else bias.detach(), self.scaling[name])
        recompute = find_recomputation(x, norms=kind.scales_rows) if dropped_TI is None else None  # these save the most
        ready = self.batched[name].prepare(self) if name in self.batched and is_launch_bound(x) else None
        if ready is not None:
            gains = (None if each is None else each.value for each in (ready.rows, ready.columns))
            B = M_or_B if ready.change_OR is None else ready.change_OR
            y_TO = BatchedProduct.apply(x_TI, dropped_TI, A_RI, B, *gains, ready, recompute, fixed.bias_O)
            return y_TO.view(*x.shape[:-1], y_TO.shape[-1])
        y_TO = AdaptedProduct.apply(x_TI, dropped_TI, A_RI, M_or_B, magnitude_O, magnitude_I, recompute, fixed)
        return y_TO.view(*x.shape[:-1], y_TO.shape[-1])

    def get_state(self, name: str) -> LayerState:
        """Get what a `BatchedAdapter` needs of this layer.

        Args:
            name: Name of the adapter.

        Returns:
            Its parameters and frozen weight.
        """
        kind = self.kinds[name]
        A_RI, B = self._get_factors(name)
        frozen, scale = self._get_frozen(name), self.scaling[name]
        if kind.scales_both:
            return LayerState(A_RI, B, self.magnitude_r[name], frozen, scale, column_magnitude=self.magnitude_c[name])
        magnitude = self.magnitude[name] if kind.scales_rows or kind.scales_columns else None
        return LayerState(A_RI, B, magnitude, frozen, scale, by_rows=not kind.scales_columns)

    def _get_factors(self, name: str) -> tuple[nn.Parameter | None, nn.Parameter]:
        """A and B; None and M for -xs types."""
        return (None, self.M_xs[name]) if self.kinds[name].is_xs else (self.lora_A[name], self.lora_B[name])

    def _get_frozen(self, name: str) -> FrozenWeight:
        weight, xs = self.base_layer.weight, self.kinds[name].is_xs
        U_OR, V_IR = (self.basis_U[name], self.basis_V[name]) if xs else (None, None)
        known = self._frozen.get(name)
        if known is None or known.weight is not weight or known.U_OR is not U_OR:
            known = self._frozen[name] = FrozenWeight(weight, U_OR, V_IR)
        return known


def unfold_conv_input(layer: nn.Conv1d, x_BCT: Tensor) -> Tensor:
    """Unfold a convolution's input into the patches that its flattened weight is multiplied with.

    Args:
        layer: The convolution.
        x_BCT: Its input.

    Returns:
        Patches, (B, frames out, in·taps).
    """
    taps, stride, dilation = layer.kernel_size[0], layer.stride[0], layer.dilation[0]
    if any(layer._reversed_padding_repeated_twice):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x_BCT = F.pad(x_BCT, layer._reversed_padding_repeated_twice, mode=mode)
    if taps == 1:
        return x_BCT[..., ::stride].transpose(1, 2)
    span = dilation * (taps - 1) + 1
    patches = x_BCT.unfold(2, span, stride)[..., ::dilation]
    return patches.permute(0, 2, 1, 3).flatten(2)


@dataclass
class SA3LoraConfig(PeftConfig):
    """PEFT's config of an adapter of the SA3 family.

    Attributes:
        spec: The adapter's settings.
        paths: Module paths of exactly the layers to adapt. PEFT shortens a list of `target_modules` to suffixes, so
            the paths have a field of their own.
        target_modules: Not used.
    """

    spec: AdapterSpec = field(default_factory=lambda: AdapterSpec("lora"))
    paths: list[str] = field(default_factory=list)
    target_modules: str = "see paths"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.LORA


def batch_layers(layers: Iterable[nn.Module], name: str) -> None:
    """Prepare the norms of an adapter for all layers at once where kernel launches take the time.

    Args:
        layers: Modules; those that are no `SA3LoraLayer` are skipped.
        name: Name of the adapter.
    """
    adapted = [layer for layer in layers if isinstance(layer, SA3LoraLayer)]
    batched = BatchedAdapter(adapted, name)
    for layer in adapted:
        layer.batched[name] = batched


class SA3LoraTuner(BaseTuner):
    """PEFT's tuner for the SA3 family: injects `SA3LoraLayer`s; PEFT names, activates, disables and unloads them."""

    prefix = "lora_"
    tuner_layer_cls = SA3LoraLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 (PEFT declares it so)

    @staticmethod
    def _check_target_module_exists(peft_config: PeftConfig, key: str) -> bool:
        return isinstance(peft_config, SA3LoraConfig) and key in peft_config.paths

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        assert isinstance(peft_config, SA3LoraConfig)
        assert isinstance(target, nn.Linear | nn.Conv1d)
        layer = SA3LoraLayer(target)
        layer.update_layer(adapter_name, peft_config.spec, current_key)
        layer.train(target.training)
        self._replace_module(parent, target_name, layer, target)
