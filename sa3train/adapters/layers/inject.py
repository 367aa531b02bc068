"""Inject adapters into a model for training, export them to `Adapter`, load them, and remove them without a trace."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, cast_adapter_dtype
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from sa3train import __version__
from sa3train.adapters.adapter import DECODER, Adapter, hash_architecture
from sa3train.adapters.apply.load_report import check_fit
from sa3train.adapters.layer_filter import find_adaptable_layers, select_layers
from sa3train.adapters.layers.peft_layers import SA3LoraConfig, SA3LoraTuner, batch_layers
from sa3train.adapters.peft_methods import ADAPTER_NAME, inject_peft_method
from sa3train.adapters.spec import INFERENCE_ONLY_TYPES, KINDS, AdapterSpec
from sa3train.adapters.start import check_rank, check_start
from sa3train.core.errors import AdapterError
from sa3train.core.log import get_logger
from sa3train.core.text import list_few

logger = get_logger(__name__)

ALSO_CONV1D = ("lokr", "loha", "hira")
"""PEFT's own methods that adapt Conv1d layers; the others get the Linear layers only."""


def inject(root: nn.Module, spec: AdapterSpec) -> "InjectedAdapter":
    """Inject an adapter into a model, ready to be trained.

    Everything else in the model is frozen. The adapter is fp32 whatever the base's dtype, and leaves the model's output
    as it is.

    Args:
        root: The model, with the DiT at `model.` and the conditioner at `conditioners.`; changed in place.
        spec: The adapter's settings.

    Returns:
        The injected adapter.

    Raises:
        AdapterError: If a pattern matches no layer, the type cannot be trained, or the model has an adapter already.
    """
    if spec.adapter_type in INFERENCE_ONLY_TYPES:
        raise AdapterError(f"{spec.adapter_type} adapters cannot be trained. Choose one of {', '.join(KINDS)}.")
    if any(isinstance(module, BaseTunerLayer) for module in root.modules()):
        raise AdapterError("The model already has an adapter in training. Remove it before injecting another.")
    layers = find_adaptable_layers(root)
    if spec.adapter_type not in KINDS and spec.adapter_type not in ALSO_CONV1D:
        layers = {path: layer for path, layer in layers.items() if isinstance(layer, nn.Linear)}
    paths = select_layers(layers, spec.include, spec.exclude)
    for pattern in (*spec.rank_pattern, *spec.alpha_pattern):
        select_layers(paths, [pattern])
    _check_ranks(spec, {path: layers[path] for path in paths})
    if spec.adapter_type in KINDS:
        tuner: BaseTuner = SA3LoraTuner(root, SA3LoraConfig(spec=spec, paths=paths), ADAPTER_NAME)
        batch_layers(root.modules(), ADAPTER_NAME)
    else:
        tuner = inject_peft_method(root, spec, paths)
        cast_adapter_dtype(root, ADAPTER_NAME)
    logger.info("%s of rank %d in %d of %d layers", spec.adapter_type, spec.rank, len(paths), len(layers))
    return InjectedAdapter(root, spec, tuner)


class InjectedAdapter:
    """An adapter in training inside a model, as `inject` returns it.

    Attributes:
        root: The model.
        spec: The adapter's settings.
        layers: PEFT's layers by module path.
    """

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
        """Return the trainable parameters in a fixed order.

        Returns:
            The parameters by `<module path>.<parameter name>`.
        """
        found: dict[str, nn.Parameter] = {}
        for path, layer in self.layers.items():
            for name, parameter in layer.named_parameters():  # type: ignore[attr-defined]
                if not name.startswith("base_layer."):
                    found[f"{path}.{'.'.join(part for part in name.split('.') if part != ADAPTER_NAME)}"] = parameter
        return found

    def parameters(self) -> list[nn.Parameter]:
        """Return the trainable parameters in a fixed order.

        Returns:
            The parameters.
        """
        return list(self.named_parameters().values())

    @property
    def cached_bytes(self) -> int:
        """Bytes of norms and factors that are held beside the parameters where layers are batched (on a GPU)."""
        found = {id(each): each for layer in self.layers.values() for each in getattr(layer, "batched", {}).values()}
        return sum(each.nbytes for each in found.values())

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Copy the adapter's tensors.

        Returns:
            fp32 tensors on the CPU by module path and by their names in files.
        """
        state: dict[str, Tensor] = dict(self.named_parameters())
        if self.spec.adapter_type not in KINDS:
            state = get_peft_model_state_dict(self.root, adapter_name=ADAPTER_NAME)
        result: dict[str, dict[str, Tensor]] = {path: {} for path in self.layers}
        for key, tensor in state.items():
            path = next(path for path in self.layers if key.startswith(path + "."))
            result[path][key.removeprefix(path + ".")] = tensor.detach().to("cpu", torch.float32, copy=True)
        return result

    def export(self, metadata: Mapping[str, str] | None = None) -> Adapter:
        """Export the adapter as it is now.

        Args:
            metadata: Provenance to add to our version and the base's architecture and dtype, such as `step`.

        Returns:
            A copy.
        """
        weight = next(iter(find_adaptable_layers(self.root).values())).weight
        provenance = {
            "sa3train_version": __version__,
            "base_architecture": hash_architecture(self.root),
            "base_dtype": str(weight.dtype).removeprefix("torch."),
        }
        return Adapter(self.spec, self.tensors(), provenance | dict(metadata or {}), "this training run")

    def load(self, adapter: Adapter) -> None:
        """Load the tensors of an adapter, to continue training it.

        Args:
            adapter: An adapter of the same type, scales, layers and shapes.

        Raises:
            AdapterError: If it differs in one of these, was trained on another part or architecture, or holds NaN or
                infinity.
        """
        mine = self.tensors()
        in_decoder = all(path.startswith(DECODER) for path in mine)
        check_start(adapter, self.spec, "decoder" if in_decoder else "dit")
        check_fit(adapter, find_adaptable_layers(self.root), allow_partial=True, measure=False)
        missing, unexpected = sorted(mine.keys() - adapter.tensors.keys()), sorted(adapter.tensors.keys() - mine.keys())
        if missing or unexpected:
            raise AdapterError(
                f"{adapter.source} does not fit: it lacks {len(missing)} layers in training "
                f"({list_few(missing) or 'none'}), and {len(unexpected)} of its layers are not in training "
                f"({list_few(unexpected) or 'none'}). Use the same include and exclude."
            )
        for path, params in mine.items():
            _check_layer(adapter, self.spec, path, params)
        self.load_tensors(adapter.tensors)

    def load_tensors(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Set the adapter's tensors.

        Args:
            tensors: Tensors as `tensors()` returns them.
        """
        if self.spec.adapter_type not in KINDS:
            state = {f"{path}.{name}": tensor for path, params in tensors.items() for name, tensor in params.items()}
            set_peft_model_state_dict(self.root, state, ADAPTER_NAME)
            return
        named = self.named_parameters()
        with torch.no_grad():
            for path, params in tensors.items():
                for name, tensor in params.items():
                    named[f"{path}.{name}"].copy_(tensor)

    @contextlib.contextmanager
    def disable(self) -> Iterator[None]:
        """Disable the adapter inside a `with` block: the model computes as without it, bit for bit.

        Yields:
            Nothing.
        """
        self._tuner.disable_adapter_layers()
        try:
            yield
        finally:
            self._tuner.enable_adapter_layers()

    @contextlib.contextmanager
    def scale(self, strength: float) -> Iterator[None]:
        """Scale the adapter inside a `with` block: layers compute with W + s (W' − W), as `AdapterStack` does.

        Compiled blocks do not notice: do not use it with them.

        Args:
            strength: The strength s.

        Yields:
            Nothing.
        """

        def mix(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            base: Tensor = layer.base_layer(*inputs)  # type: ignore[operator]
            return base + strength * (output - base)

        handles = [layer.register_forward_hook(mix) for layer in self.layers.values()]  # type: ignore[attr-defined]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def remove(self) -> None:
        """Remove the adapter from the model; the base layers are back, untouched and frozen."""
        self._tuner.unload()
        self.layers = {}


def _check_ranks(spec: AdapterSpec, layers: Mapping[str, nn.Module]) -> None:
    """Check that ranks of -xs types do not exceed the number of singular vectors."""
    if spec.adapter_type not in KINDS or not KINDS[spec.adapter_type].is_xs:
        return
    for path, layer in layers.items():
        count = min(layer.weight.flatten(1).shape)  # type: ignore[operator]
        if spec.get_rank(path) > count:
            raise AdapterError(
                f"rank {spec.get_rank(path)} is above the {count} singular vectors of {path}. Lower rank, or set that "
                f"layer's own in rank_pattern."
            )


def _check_layer(adapter: Adapter, spec: AdapterSpec, path: str, params: Mapping[str, Tensor]) -> None:
    found, shapes = ({name: tuple(x.shape) for name, x in each.items()} for each in (adapter.tensors[path], params))
    if found != shapes:
        check_rank(adapter, spec, path)
        raise AdapterError(f"{adapter.source} does not fit at {path}: it has {found}, but training needs {shapes}.")
