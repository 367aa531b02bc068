"""Adapters for training: put into a model by PEFT, exported to and loaded from `Adapter`, taken out without a trace."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, cast_adapter_dtype
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from sa3train import __version__
from sa3train.adapters.adapter import Adapter, architecture_of
from sa3train.adapters.layer_filter import Filter, adaptable_layers
from sa3train.adapters.layers.peft_layers import FamilyConfig, FamilyTuner, work_together
from sa3train.adapters.peft_methods import NAME, start_method
from sa3train.adapters.spec import KINDS, PLAY_ONLY, AdapterSpec
from sa3train.core.errors import AdapterError
from sa3train.core.log import get_logger

logger = get_logger(__name__)

ALSO_CONV1D = ("lokr", "loha", "hira")
"""PEFT's own methods that adapt Conv1d layers; the others are given the Linear layers only."""


def inject(root: nn.Module, spec: AdapterSpec) -> "Injected":
    """Put an adapter of `spec` into the layers of `root` its filters name, ready to be trained.

    Everything else in `root` is frozen. The adapter is fp32 whatever the base is, and leaves the model's output as it
    is. Raises `AdapterError` when a filter or pattern matches nothing, or `root` has an adapter already.
    """
    if spec.kind in PLAY_ONLY:
        raise AdapterError(f"{spec.kind} adapters can be played but not trained; choose one of {', '.join(KINDS)}.")
    if any(isinstance(module, BaseTunerLayer) for module in root.modules()):
        raise AdapterError("the model already has an adapter in training; remove it before injecting another.")
    layers = adaptable_layers(root)
    if spec.kind not in KINDS and spec.kind not in ALSO_CONV1D:
        layers = {path: layer for path, layer in layers.items() if isinstance(layer, nn.Linear)}
    paths = spec.filter.select(layers)
    for pattern in (*spec.rank_pattern, *spec.alpha_pattern):
        Filter([pattern]).select(paths)
    _check_ranks(spec, {path: layers[path] for path in paths})
    if spec.kind in KINDS:
        tuner: BaseTuner = FamilyTuner(root, FamilyConfig(spec=spec, paths=paths), NAME)
        work_together(root.modules(), NAME)
    else:
        tuner = start_method(root, spec, paths)
        cast_adapter_dtype(root, NAME)
    logger.info("%s of rank %d in %d of %d layers", spec.kind, spec.rank, len(paths), len(layers))
    return Injected(root, spec, tuner)


class Injected:
    """An adapter in training inside a model. Made by `inject`."""

    def __init__(self, root: nn.Module, spec: AdapterSpec, tuner: BaseTuner) -> None:
        self.root = root
        self.spec = spec
        self._tuner = tuner
        self.layers: dict[str, BaseTunerLayer] = {
            path: module for path, module in root.named_modules() if isinstance(module, BaseTunerLayer)
        }

    @property
    def paths(self) -> list[str]:
        """Module paths of the adapted layers."""
        return list(self.layers)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """The trainable parameters by `<module path>.<parameter name>`, in a fixed order."""
        found: dict[str, nn.Parameter] = {}
        for path, layer in self.layers.items():
            for name, parameter in layer.named_parameters():  # type: ignore[attr-defined]
                if not name.startswith("base_layer."):
                    found[f"{path}.{_without_adapter_name(name)}"] = parameter
        return found

    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters, in a fixed order."""
        return list(self.named_parameters().values())

    @property
    def worked_out_bytes(self) -> int:
        """Bytes that are held beside the parameters where layers are worked out together (on a GPU)."""
        found = {id(each): each for layer in self.layers.values() for each in getattr(layer, "together", {}).values()}
        return sum(each.nbytes for each in found.values())

    def param_groups(self, lr: float, ratio: float = 1.0) -> list[dict[str, Any]]:
        """Optimizer groups; with LoRA+ `ratio`, the B matrices learn at `lr` × ratio (Hayou et al. 2024).

        Raises `AdapterError` when a ratio is asked for and the kind has no B.
        """
        named = self.named_parameters()
        if ratio == 1.0:
            return [{"params": list(named.values()), "lr": lr, "name": "adapter"}]
        fast = [parameter for name, parameter in named.items() if name.endswith(".lora_B")]
        if not fast or ratio <= 0:
            raise AdapterError(
                f"a LoRA+ ratio must be above 0 and needs B matrices; {self.spec.kind} has {len(fast)}, "
                f"and the ratio is {ratio}. Set it to 1."
            )
        slow = [parameter for name, parameter in named.items() if not name.endswith(".lora_B")]
        return [
            {"params": slow, "lr": lr, "name": "adapter"},
            {"params": fast, "lr": lr * ratio, "name": "adapter_B"},
        ]

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Copies of the adapter's tensors, fp32 on the CPU, by module path and by their names in files."""
        state: dict[str, Tensor] = dict(self.named_parameters())
        if self.spec.kind not in KINDS:
            state = get_peft_model_state_dict(self.root, adapter_name=NAME)
        result: dict[str, dict[str, Tensor]] = {path: {} for path in self.layers}
        for key, tensor in state.items():
            path = next(path for path in self.layers if key.startswith(path + "."))
            result[path][key.removeprefix(path + ".")] = tensor.detach().to("cpu", torch.float32, copy=True)
        return result

    def export(self, metadata: Mapping[str, str] | None = None) -> Adapter:
        """The adapter as it is now, with provenance: `metadata` (step, base model, …), version, architecture."""
        weight = next(iter(adaptable_layers(self.root).values())).weight
        provenance = {
            "sa3train_version": __version__,
            "base_architecture": architecture_of(self.root),
            "base_dtype": str(weight.dtype).removeprefix("torch."),
        }
        return Adapter(self.spec, self.tensors(), provenance | dict(metadata or {}), "this training run")

    def load(self, adapter: Adapter) -> None:
        """Continue from `adapter`. Raises `AdapterError` unless it has this kind, these scales, layers and shapes."""
        if adapter.spec.kind != self.spec.kind:
            raise AdapterError(f"{adapter.source} is {adapter.spec.kind}, and {self.spec.kind} is being trained.")
        mine = self.tensors()
        absent, strange = sorted(mine.keys() - adapter.tensors.keys()), sorted(adapter.tensors.keys() - mine.keys())
        if absent or strange:
            raise AdapterError(
                f"{adapter.source} does not fit: {len(absent)} layers in training are not in it ({_few(absent)}), and "
                f"{len(strange)} of its layers are not in training ({_few(strange)}). Use the same include and exclude."
            )
        for path, params in mine.items():
            _check_layer(adapter, self.spec, path, params)
        self.load_tensors(adapter.tensors)

    def load_tensors(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Set the adapter's tensors, named as `tensors()` names them."""
        if self.spec.kind not in KINDS:
            state = {f"{path}.{name}": tensor for path, params in tensors.items() for name, tensor in params.items()}
            set_peft_model_state_dict(self.root, state, NAME)
            return
        named = self.named_parameters()
        with torch.no_grad():
            for path, params in tensors.items():
                for name, tensor in params.items():
                    named[f"{path}.{name}"].copy_(tensor)

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the model computes as it does without the adapter, bit for bit."""
        self._tuner.disable_adapter_layers()
        try:
            yield
        finally:
            self._tuner.enable_adapter_layers()

    def remove(self) -> None:
        """Take the adapter out; the base layers are back in their places, untouched and frozen."""
        self._tuner.unload()
        self.layers = {}


def _without_adapter_name(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != NAME)


def _check_ranks(spec: AdapterSpec, layers: Mapping[str, nn.Module]) -> None:
    """A rank above a weight's smaller side cannot be reached by -xs kinds, and only wastes memory in the others."""
    if spec.kind not in KINDS:
        return
    too_high = {path: min(layer.weight.flatten(1).shape) for path, layer in layers.items()}  # type: ignore[operator]
    too_high = {path: side for path, side in too_high.items() if spec.rank_of(path) > side}
    if too_high and KINDS[spec.kind].xs:
        path, side = next(iter(too_high.items()))
        raise AdapterError(
            f"rank {spec.rank_of(path)} is above the {side} singular vectors of {path}; lower rank, or give that layer "
            f"one of its own in rank_pattern."
        )


def _check_layer(adapter: Adapter, spec: AdapterSpec, path: str, params: Mapping[str, Tensor]) -> None:
    theirs = adapter.tensors[path]
    shapes = {name: tuple(tensor.shape) for name, tensor in params.items()}
    if {name: tuple(tensor.shape) for name, tensor in theirs.items()} != shapes:
        found = {name: tuple(tensor.shape) for name, tensor in theirs.items()}
        raise AdapterError(f"{adapter.source} does not fit at {path}: it has {found}, and {shapes} is being trained.")
    if spec.kind in KINDS and abs(adapter.spec.scale_of(path) - spec.scale_of(path)) > 1e-9:
        raise AdapterError(
            f"{adapter.source} has the scale {adapter.spec.scale_of(path):g} (alpha / rank) at {path}, and "
            f"{spec.scale_of(path):g} is being trained. Set alpha to match."
        )


def _few(paths: Sequence[str]) -> str:
    return ", ".join(paths[:2]) + (", …" if len(paths) > 2 else "") if paths else "none"
