"""fp16 only where it is as accurate as fp32: each layer is checked, and kept in a wider dtype where it fails.

fp16 ends at 65504 and has 11 significant bits: a layer with larger numbers inside, or in what it passes on, makes
infinity of them. The model runs in fp32 on a fixed input; every block of the DiT then runs in fp16 on the very inputs
it had, and is compared. What fails is kept in bf16 on a GPU that has it, else in fp32. The autoencoder is checked as a
whole, and so is the DiT once its blocks are converted. Blocks are moved to the device in fp32 one at a time, each when
it runs, so that the device never holds more of a DiT than the converted blocks and one more.

Shapes: B clips, C latent channels, T latent frames, L text tokens, D widths.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sa3train.core.device import get_widest_float
from sa3train.core.dtypes import name_dtype
from sa3train.core.log import get_logger
from sa3train.models.autoencoder import Autoencoder
from sa3train.models.checkpoint import StableAudio3
from sa3train.models.conditioners import TextEmbedding
from sa3train.models.dit import Block, BlockConditions, Modulation, RawConditions

logger = get_logger(__name__)

MAX_ERROR = 0.01
"""Largest relative error of a layer's output in fp16; that of bf16 is about 0.004."""
MAX_FP16 = torch.finfo(torch.float16).max
_FRAMES, _TOKENS, _LEVELS = 64, 16, (0.95, 0.5, 0.1)


@dataclass(frozen=True)
class LayerCheck:
    """Accuracy of one layer in fp16.

    Attributes:
        layer: Name, for the log.
        error: Norm of the error of its output, relative to that of the output in fp32.
        largest: Largest number in and around it in fp32.
    """

    layer: str
    error: float
    largest: float = 0.0

    @property
    def needs_fallback(self) -> bool:
        """Whether fp16 is not accurate enough; a NaN as the error is not either."""
        return not self.error <= MAX_ERROR or not self.largest < MAX_FP16

    def __str__(self) -> str:
        why = f"error {self.error:.2%}" if self.largest < MAX_FP16 else f"values up to {self.largest:.3g}"
        return f"{self.layer} ({why})"


class _CastableWeights:
    """Weights of a layer that can be cast back and forth: what was loaded (mapped, if the file is fp32) stays."""

    def __init__(self, layer: nn.Module, device: torch.device) -> None:
        self.tensors, self.device = [*layer.parameters(), *layer.buffers()], device
        self.loaded = [tensor.data for tensor in self.tensors]

    def cast(self, dtype: torch.dtype) -> None:
        """Cast to `dtype` on the device, from what was loaded."""
        for tensor, loaded in zip(self.tensors, self.loaded, strict=True):
            tensor.data = loaded.to(self.device).to(dtype)


class _LayerObserver:
    """Records the inputs of a layer's last call, its output, and the largest number in and around it."""

    def __init__(self, layer: nn.Module, inputs: bool = True) -> None:
        self.layer, self.largest = layer, 0.0
        self.inputs: tuple[Any, ...] = ()
        self.output = torch.empty(0)
        self._hooks = [module.register_forward_hook(self._record_largest) for module in layer.modules()]
        if inputs:
            self._hooks.append(layer.register_forward_hook(self._record_call))

    def stop(self) -> None:
        """Stop recording."""
        for hook in self._hooks:
            hook.remove()

    def clear(self) -> None:
        """Release what was recorded."""
        self.inputs, self.output = (), torch.empty(0)

    def _record_largest(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        for tensor in (*inputs, output):
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.numel():
                largest = tensor.abs().max().item()
                self.largest = largest if largest != largest else max(self.largest, largest)

    def _record_call(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        self.inputs, self.output = inputs, output


def _compute_relative_error(found: Tensor, exact: Tensor) -> float:
    """Compute ‖found − exact‖ / ‖exact‖; NaN when `found` has one."""
    wide = get_widest_float(exact.device)
    return ((found.to(wide) - exact.to(wide)).norm() / exact.to(wide).norm().clamp(min=1e-12)).item()


@torch.no_grad()
def convert_to_fp16(model: StableAudio3, device: torch.device | str) -> list[LayerCheck]:
    """Convert a model to fp16, but for layers that are not accurate enough, and log which.

    One input is checked. Another may still meet a number that is too large, which generation reports as an error.

    Args:
        model: Model loaded in fp32, on any device; changed in place.
        device: Where it goes.

    Returns:
        The checks of all layers.
    """
    target = torch.device(device)
    checks = [] if model.autoencoder is None else [_convert_autoencoder(model.autoencoder, target)]
    checks = [*_convert_dit(model, target), *checks]
    model.conditioner.half()
    _log_checks(checks, target)
    return checks


@torch.no_grad()
def convert_autoencoder_to_fp16(autoencoder: Autoencoder, device: torch.device | str) -> LayerCheck:
    """Convert an autoencoder to fp16 if it is accurate enough, and log whether it is.

    Args:
        autoencoder: Autoencoder loaded in fp32; changed in place.
        device: Where it goes.

    Returns:
        The check.
    """
    check = _convert_autoencoder(autoencoder, torch.device(device))
    _log_checks([check], torch.device(device))
    return check


def _log_checks(checks: Sequence[LayerCheck], device: torch.device) -> None:
    failed = [str(check) for check in checks if check.needs_fallback]
    errors = [check.error for check in checks if not check.needs_fallback]
    limit = f", largest error {max(errors):.2%} (limit {MAX_ERROR:.0%})" if errors else ""
    logger.info("fp16 in %d of %d layers%s", len(errors), len(checks), limit)
    if failed:
        fallback = name_dtype(choose_fallback_dtype(device))
        logger.warning("not accurate enough in fp16, so kept in %s: %s", fallback, "; ".join(failed))


def choose_fallback_dtype(device: torch.device) -> torch.dtype:
    """Choose the dtype of layers that fail in fp16.

    Args:
        device: Where the model computes.

    Returns:
        bf16, which has the range of fp32, on a GPU that computes it; else fp32.
    """
    cuda = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if cuda else torch.float32


def _convert_dit(model: StableAudio3, device: torch.device) -> list[LayerCheck]:
    dit, wide, weights = model.dit, choose_fallback_dtype(device), _CastableWeights(model.dit, device)
    model.conditioner.to(device)
    blocks = {f"block {index}": block for index, block in enumerate(dit.transformer.layers)}
    layers = {**blocks, "project_out": dit.transformer.project_out}
    in_layers = {id(tensor) for layer in layers.values() for tensor in [*layer.parameters(), *layer.buffers()]}
    others = [tensor for tensor in [*dit.parameters(), *dit.buffers()] if id(tensor) not in in_layers]
    gates = [block.get_parameter("to_scale_shift_gate") for block in blocks.values()]  # read for all blocks at once
    for tensor in (*others, *gates):
        tensor.data = tensor.data.to(device)
    tried = [_check_when_run(name, layer, device) for name, layer in layers.items()]
    forward = _make_test_forward(model, device)
    exact_BCT = forward()
    checks = [check for found in tried for check in found]
    for tensor in others:
        tensor.data = tensor.data.half()
    if any(check.needs_fallback for check in checks):
        for layer in layers.values():
            _cast_inputs(layer)
        dit.transformer.project_out.register_forward_hook(lambda _, inputs, output: output.to(dit.dtype))
    whole = LayerCheck("the denoiser as a whole", _compute_relative_error(forward(), exact_BCT))
    if whole.needs_fallback:
        weights.cast(wide)
    return [*checks, whole]


def _check_when_run(name: str, layer: nn.Module, device: torch.device) -> list[LayerCheck]:
    """Check `layer` once it runs: it is moved to `device` for that and stays in the dtype it is accurate in."""
    checks: list[LayerCheck] = []
    watched, weights = _LayerObserver(layer), _CastableWeights(layer, device)

    def load(*_: Any) -> None:
        weights.cast(torch.float32)

    def check(*_: Any) -> None:
        for handle in handles:
            handle.remove()
        watched.stop()
        weights.cast(torch.float16)
        found = layer(*(_cast(value, torch.float16) for value in watched.inputs))
        checks.append(LayerCheck(name, _compute_relative_error(found, watched.output), watched.largest))
        if checks[0].needs_fallback:
            weights.cast(choose_fallback_dtype(device))
        watched.clear()

    handles = [layer.register_forward_pre_hook(load), layer.register_forward_hook(check)]
    return checks


def _convert_autoencoder(autoencoder: Autoencoder, device: torch.device) -> LayerCheck:
    weights = _CastableWeights(autoencoder, device)
    weights.cast(torch.float32)
    seeded = torch.Generator().manual_seed(0)
    z_BCT = torch.randn(1, autoencoder.latent_channels, _FRAMES, generator=seeded).to(device)
    watched = _LayerObserver(autoencoder, inputs=False)
    audio_BCN = autoencoder.decode(z_BCT, noise=False)
    exact_BCT = autoencoder.encode(audio_BCN, noise=False)
    watched.stop()
    weights.cast(torch.float16)
    errors = [
        _compute_relative_error(autoencoder.decode(z_BCT, noise=False), audio_BCN),
        _compute_relative_error(autoencoder.encode(audio_BCN, noise=False), exact_BCT),
    ]
    check = LayerCheck("the autoencoder", max(errors, key=lambda error: (error != error, error)), watched.largest)
    if check.needs_fallback:
        weights.cast(choose_fallback_dtype(device))
    return check


def _make_test_forward(model: StableAudio3, device: torch.device) -> Callable[[], Tensor]:
    """Make a function that computes the DiT's velocity on seeded noise at three noise levels and seeded text."""
    config, seeded = model.config.dit, torch.Generator().manual_seed(0)
    rows = len(_LEVELS)
    hidden_BLD = torch.randn(rows, min(_TOKENS, model.conditioner.max_length), config.context_width, generator=seeded)
    mask_BL = torch.ones(hidden_BLD.shape[:2], dtype=torch.bool)
    text = TextEmbedding(hidden_BLD.to(device), mask_BL.to(device))
    conditions = model.conditioner.condition(text, torch.full((rows,), 12.0, device=device))
    x_BCT = torch.randn(rows, config.latent_width, _FRAMES, generator=seeded).to(device)
    local_BCT = torch.zeros(rows, config.local_width, _FRAMES, device=device)
    t_B = torch.tensor(_LEVELS, device=device)

    def forward() -> Tensor:
        velocity_BCT: Tensor = model.dit(
            x_BCT,
            t_B,
            cross_attn_cond_BLD=conditions.cross_attn_cond_BLD,
            global_cond_BD=conditions.global_cond_BD,
            local_add_cond_BCT=local_BCT,
        )
        return velocity_BCT

    return forward


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Cast an argument of a block; cosines and sines of positions, which are a pair, stay in fp32."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, Modulation):  # norms accept theirs in any dtype
        return value._replace(gates=value.gates.to(dtype))
    if isinstance(value, RawConditions):
        return RawConditions(value.context_BMD.to(dtype), None if value.local is None else value.local.to(dtype))
    if isinstance(value, BlockConditions):
        local = None if value.local_BLD is None else value.local_BLD.to(dtype)
        return dataclasses.replace(value, context=tuple(each.to(dtype) for each in value.context), local_BLD=local)
    return value


def _cast_inputs(layer: nn.Module) -> None:
    """Make `layer` cast its inputs to the dtype of its weights."""

    def cast_to_own(value: Any) -> Any:
        return _cast(value, next(layer.parameters()).dtype)

    layer.register_forward_pre_hook(lambda _, inputs: tuple(map(cast_to_own, inputs)))
    if isinstance(layer, Block):  # called directly too, once per generation
        prepare = layer.prepare
        layer.prepare = lambda conditions, layout: prepare(cast_to_own(conditions), layout)  # type: ignore[method-assign]
