"""The SA3 family as PEFT layers. Their forward never makes a weight-sized Δ; see `norms` and `adapted_product`.

Shape suffixes: B batch, T tokens (or frames), I columns (in, or in·taps), O rows (out), R rank.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftConfig
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import PeftType
from torch import Tensor, nn

from sa3train.adapters.apply.effective_weight import initial_parameters
from sa3train.adapters.apply.svd_basis import singular_basis
from sa3train.adapters.layers.batched_linear import GainedProduct, Together, few_launches
from sa3train.adapters.layers.batched_norms import Member
from sa3train.adapters.layers.frozen_weight import Frozen
from sa3train.adapters.layers.fused_linear import AdaptedProduct, Fixed, recipe_of
from sa3train.adapters.spec import KINDS, AdapterSpec, Kind

TRAINED = ("lora_A", "lora_B", "M_xs", "magnitude", "magnitude_r", "magnitude_c")


class FamilyLayer(nn.Module, BaseTunerLayer):
    """A Linear or Conv1d with one adapter of the SA3 family.

    The adapter's parameters are fp32 whatever the base is. With adapters disabled the base layer runs as it is.
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
        self.basis_U, self.basis_V = BufferDict(persistent=False), BufferDict(persistent=False)
        self.scaling: dict[str, float] = {}
        self.kinds: dict[str, Kind] = {}
        self.dropout: dict[str, float] = {}
        self.merged_adapters: list[str] = []
        self._frozen: dict[str, Frozen] = {}
        self.together: dict[str, Together] = {}

    def update_layer(self, adapter_name: str, spec: AdapterSpec, path: str) -> None:
        """Give this layer an adapter called `adapter_name`, at which the effective weight is the base's."""
        kind, rank, weight = KINDS[spec.kind], spec.rank_of(path), self.base_layer.weight
        for name, tensor in initial_parameters(kind, weight, rank).items():
            getattr(self, name)[adapter_name] = nn.Parameter(tensor)
        if kind.xs:
            self.basis_U[adapter_name], self.basis_V[adapter_name] = singular_basis(weight, rank)
        self.scaling[adapter_name] = spec.scale_of(path)
        self.kinds[adapter_name] = kind
        self.dropout[adapter_name] = spec.dropout
        self.set_adapter(self.active_adapters)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The adapted layer's output, in the base's dtype."""
        active = [name for name in self.active_adapters if name in self.kinds]
        if self.disable_adapters or not active:
            return self.base_layer(x, *args, **kwargs)
        if len(active) > 1:
            raise RuntimeError(f"only one adapter can be trained at a time; {active} are active")
        x = x.to(self.base_layer.weight.dtype)
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return self._unfolded(x, active[0])
        return self._unfolded(x, active[0])

    def _unfolded(self, x: Tensor, name: str) -> Tensor:
        if isinstance(self.base_layer, nn.Conv1d):
            return self._adapted(conv_columns(self.base_layer, x), name).transpose(1, 2)
        return self._adapted(x, name)

    def _adapted(self, x: Tensor, name: str) -> Tensor:
        kind = self.kinds[name]
        frozen = self._frozen_of(name)
        A_RI, B = (None, self.M_xs[name]) if kind.xs else (self.lora_A[name], self.lora_B[name])
        magnitude_O = (self.magnitude_r if kind.cols else self.magnitude)[name] if kind.rows else None
        magnitude_I = (self.magnitude_c if kind.rows else self.magnitude)[name] if kind.cols else None
        rate = self.dropout[name] if self.training else 0.0
        x_TI = x.reshape(-1, x.shape[-1])
        dropped_TI = F.dropout(x_TI, rate) if rate else None
        bias = self.base_layer.bias
        fixed = Fixed(frozen, None if bias is None else bias.detach(), self.scaling[name])
        recipe = recipe_of(x, norms=kind.rows) if dropped_TI is None else None  # those kinds keep the most
        ready = self.together[name].of(self) if name in self.together and few_launches(x) else None
        if ready is not None:
            gains = (None if each is None else each.value for each in (ready.rows, ready.columns))
            B = B if ready.change_OR is None else ready.change_OR
            y_TO = GainedProduct.apply(x_TI, dropped_TI, A_RI, B, *gains, ready, recipe, fixed.bias_O)
            return y_TO.view(*x.shape[:-1], y_TO.shape[-1])
        y_TO = AdaptedProduct.apply(x_TI, dropped_TI, A_RI, B, magnitude_O, magnitude_I, recipe, fixed)
        return y_TO.view(*x.shape[:-1], y_TO.shape[-1])

    def member(self, name: str) -> Member:
        """What `together` has to know of this layer."""
        kind = self.kinds[name]
        A_RI, B = (None, self.M_xs[name]) if kind.xs else (self.lora_A[name], self.lora_B[name])
        frozen, scale = self._frozen_of(name), self.scaling[name]
        if kind.both:
            return Member(A_RI, B, self.magnitude_r[name], frozen, scale, second=self.magnitude_c[name])
        magnitude = self.magnitude[name] if kind.rows or kind.cols else None
        return Member(A_RI, B, magnitude, frozen, scale, by_rows=not kind.cols)

    def _frozen_of(self, name: str) -> Frozen:
        weight, xs = self.base_layer.weight, self.kinds[name].xs
        U_OR, V_IR = (self.basis_U[name], self.basis_V[name]) if xs else (None, None)
        known = self._frozen.get(name)
        if known is None or known.weight is not weight or known.U_OR is not U_OR:
            known = self._frozen[name] = Frozen(weight, U_OR, V_IR)
        return known


def conv_columns(layer: nn.Conv1d, x_BCT: Tensor) -> Tensor:
    """(B, frames out, in·taps): the patches a Conv1d multiplies its flattened weight with."""
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
class FamilyConfig(PeftConfig):
    """PEFT's view of an adapter of the SA3 family: the spec and the exact module paths it goes to.

    PEFT shortens a list of `target_modules` to suffixes, so the paths are kept under a name of their own.
    """

    spec: AdapterSpec = field(default_factory=lambda: AdapterSpec("lora"))
    paths: list[str] = field(default_factory=list)
    target_modules: str = "see paths"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.LORA


def work_together(layers: Iterable[nn.Module], name: str) -> None:
    """Have the adapter `name` of all `layers` worked out at once where launches are what takes time."""
    chosen = [layer for layer in layers if isinstance(layer, FamilyLayer)]
    together = Together(chosen, name)
    for layer in chosen:
        layer.together[name] = together


class FamilyTuner(BaseTuner):
    """PEFT's tuner for the SA3 family: it injects `FamilyLayer`s, and PEFT names, activates, disables, unloads them."""

    prefix = "lora_"
    tuner_layer_cls = FamilyLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 (PEFT declares it so)

    @staticmethod
    def _check_target_module_exists(peft_config: PeftConfig, key: str) -> bool:
        return isinstance(peft_config, FamilyConfig) and key in peft_config.paths

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
        assert isinstance(peft_config, FamilyConfig)
        assert isinstance(target, nn.Linear | nn.Conv1d)
        layer = FamilyLayer(target)
        layer.update_layer(adapter_name, peft_config.spec, current_key)
        layer.train(target.training)
        self._replace_module(parent, target_name, layer, target)
