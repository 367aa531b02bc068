"""fp16 only where it is as good as fp32: each layer of a model is tried on what it meets, and kept wide where it fails.

fp16 ends at 65504 and has 11 significant bits: a layer with larger numbers inside, or in what it passes on, makes
infinity of them. The model runs in fp32 on a fixed input; every block of the denoiser then runs in fp16 on the very
inputs it had, and is compared. What fails is kept in bf16 on a GPU that has it, else in fp32. The autoencoder is tried
as a whole, and so is the denoiser once its blocks are settled. Blocks come to the device in fp32 one at a time, each
when it runs, so that the device never holds more of a denoiser than what stays of it and a block.

Shapes: B items, C latent channels, T latent frames, L text tokens, D widths.

A layer of a model in fp32 and in fp16: its weights there and back, what it meets, and the verdict.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sa3train.core.device import widest
from sa3train.core.log import get_logger
from sa3train.models.autoencoder import Autoencoder
from sa3train.models.checkpoint import StableAudio3
from sa3train.models.conditioners import TextEmbedding
from sa3train.models.dit import Block, BlockConditions, Conditions, Modulation

ERROR = 0.01
"""The most that a layer's output in fp16 may differ, as a share of its length in fp32; bf16 differs by about 0.004."""
LARGEST = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class Verdict:
    """How one layer does in fp16: the error of its output, and the largest number in and around it in fp32."""

    layer: str
    error: float
    largest: float = 0.0

    @property
    def kept_wide(self) -> bool:
        """Whether fp16 is not good enough for it; an error that is not a number is no good either."""
        return not self.error <= ERROR or not self.largest < LARGEST

    def __str__(self) -> str:
        why = f"{self.error:.2%} off" if self.largest < LARGEST else f"numbers up to {self.largest:.3g}"
        return f"{self.layer} ({why})"


class Weights:
    """A layer's weights, which may be cast there and back: what was loaded (mapped, if the file is fp32) stays."""

    def __init__(self, layer: nn.Module, device: torch.device) -> None:
        self.tensors, self.device = [*layer.parameters(), *layer.buffers()], device
        self.loaded = [tensor.data for tensor in self.tensors]

    def cast(self, dtype: torch.dtype) -> None:
        """To the device and `dtype`, from what was loaded."""
        for tensor, loaded in zip(self.tensors, self.loaded, strict=True):
            tensor.data = loaded.to(self.device).to(dtype)


class Watched:
    """A layer under observation: the inputs of its last call, its output, and the largest number in and around it."""

    def __init__(self, layer: nn.Module, inputs: bool = True) -> None:
        self.layer, self.largest = layer, 0.0
        self.inputs: tuple[Any, ...] = ()
        self.output = torch.empty(0)
        self._hooks = [module.register_forward_hook(self._see) for module in layer.modules()]
        if inputs:
            self._hooks.append(layer.register_forward_hook(self._keep))

    def stop(self) -> None:
        """Observe no longer."""
        for hook in self._hooks:
            hook.remove()

    def let_go(self) -> None:
        """Keep nothing any longer."""
        self.inputs, self.output = (), torch.empty(0)

    def _see(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        for tensor in (*inputs, output):
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.numel():
                largest = tensor.abs().max().item()
                self.largest = largest if largest != largest else max(self.largest, largest)

    def _keep(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        self.inputs, self.output = inputs, output


def error_of(found: Tensor, exact: Tensor) -> float:
    """‖found − exact‖ / ‖exact‖; not a number when `found` has one that is none."""
    wide = widest(exact.device)
    return ((found.to(wide) - exact.to(wide)).norm() / exact.to(wide).norm().clamp(min=1e-12)).item()


logger = get_logger(__name__)

_FRAMES, _TOKENS, _LEVELS = 64, 16, (0.95, 0.5, 0.1)


@torch.no_grad()
def settle_in_fp16(model: StableAudio3, device: torch.device | str) -> list[Verdict]:
    """Bring `model`, loaded in fp32 on any device, to `device` in fp16 but for the layers that fail; say in the log
    which. The verdicts of all.

    One input is tried; another may still meet a number that is too large, which generating reports as an error.
    """
    place = torch.device(device)
    verdicts = [] if model.autoencoder is None else [_settle_autoencoder(model.autoencoder, place)]
    verdicts = [*_settle_denoiser(model, place), *verdicts]
    model.conditioner.half()
    _say(verdicts, place)
    return verdicts


@torch.no_grad()
def settle_autoencoder(autoencoder: Autoencoder, device: torch.device | str) -> Verdict:
    """`settle_in_fp16` of an autoencoder alone."""
    verdict = _settle_autoencoder(autoencoder, torch.device(device))
    _say([verdict], torch.device(device))
    return verdict


def _say(verdicts: Sequence[Verdict], device: torch.device) -> None:
    kept = [str(verdict) for verdict in verdicts if verdict.kept_wide]
    errors = [verdict.error for verdict in verdicts if not verdict.kept_wide]
    limit = f", each within {max(errors):.2%} of fp32, where {ERROR:.0%} is allowed" if errors else ""
    logger.info("fp16 in %d of %d layers%s", len(errors), len(verdicts), limit)
    if kept:
        wide = str(wide_dtype(device)).removeprefix("torch.")
        logger.warning("not good enough in fp16, so kept in %s: %s", wide, "; ".join(kept))


def wide_dtype(device: torch.device) -> torch.dtype:
    """What failing layers are kept in: bf16, which has fp32's range, where a GPU computes it, else fp32."""
    cuda = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if cuda else torch.float32


def _settle_denoiser(model: StableAudio3, device: torch.device) -> list[Verdict]:
    dit, wide, weights = model.dit, wide_dtype(device), Weights(model.dit, device)
    model.conditioner.to(device)
    blocks = {f"block {index}": block for index, block in enumerate(dit.transformer.layers)}
    layers = {**blocks, "project_out": dit.transformer.project_out}
    in_layers = {id(tensor) for layer in layers.values() for tensor in [*layer.parameters(), *layer.buffers()]}
    others = [tensor for tensor in [*dit.parameters(), *dit.buffers()] if id(tensor) not in in_layers]
    gates = [block.get_parameter("to_scale_shift_gate") for block in blocks.values()]  # read for all blocks at once
    for tensor in (*others, *gates):
        tensor.data = tensor.data.to(device)
    tried = [_tried(name, layer, device) for name, layer in layers.items()]
    forward = _fixed_input(model, device)
    exact_BCT = forward()
    verdicts = [verdict for found in tried for verdict in found]
    for tensor in others:
        tensor.data = tensor.data.half()
    if any(verdict.kept_wide for verdict in verdicts):
        for layer in layers.values():
            _cast_inputs(layer)
        dit.transformer.project_out.register_forward_hook(lambda _, inputs, output: output.to(dit.dtype))
    whole = Verdict("the denoiser as a whole", error_of(forward(), exact_BCT))
    if whole.kept_wide:
        weights.cast(wide)
    return [*verdicts, whole]


def _tried(name: str, layer: nn.Module, device: torch.device) -> list[Verdict]:
    """Holds the verdict on `layer` once it has run: it comes to `device` for that, and stays in what it is good in."""
    verdicts: list[Verdict] = []
    watched, weights = Watched(layer), Weights(layer, device)

    def bring(*_: Any) -> None:
        weights.cast(torch.float32)

    def judge(*_: Any) -> None:
        for handle in handles:
            handle.remove()
        watched.stop()
        weights.cast(torch.float16)
        found = layer(*(_to(value, torch.float16) for value in watched.inputs))
        verdicts.append(Verdict(name, error_of(found, watched.output), watched.largest))
        if verdicts[0].kept_wide:
            weights.cast(wide_dtype(device))
        watched.let_go()

    handles = [layer.register_forward_pre_hook(bring), layer.register_forward_hook(judge)]
    return verdicts


def _settle_autoencoder(autoencoder: Autoencoder, device: torch.device) -> Verdict:
    weights = Weights(autoencoder, device)
    weights.cast(torch.float32)
    seeded = torch.Generator().manual_seed(0)
    z_BCT = torch.randn(1, autoencoder.latent_channels, _FRAMES, generator=seeded).to(device)
    watched = Watched(autoencoder, inputs=False)
    audio_BCN = autoencoder.decode(z_BCT, noise=False)
    exact_BCT = autoencoder.encode(audio_BCN, noise=False)
    watched.stop()
    weights.cast(torch.float16)
    errors = [
        error_of(autoencoder.decode(z_BCT, noise=False), audio_BCN),
        error_of(autoencoder.encode(audio_BCN, noise=False), exact_BCT),
    ]
    verdict = Verdict("the autoencoder", max(errors, key=lambda error: (error != error, error)), watched.largest)
    if verdict.kept_wide:
        weights.cast(wide_dtype(device))
    return verdict


def _fixed_input(model: StableAudio3, device: torch.device) -> Callable[[], Tensor]:
    """The denoiser's velocity (B, C, T) on seeded noise at three noise levels, with a seeded text."""
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


def _to(value: Any, dtype: torch.dtype) -> Any:
    """An argument of a block in `dtype`; cosines and sines of positions, which come as a pair, stay in fp32."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, Modulation):  # norms take theirs in any dtype
        return value._replace(gates=value.gates.to(dtype))
    if isinstance(value, Conditions):
        return Conditions(value.context_BMD.to(dtype), None if value.local is None else value.local.to(dtype))
    if isinstance(value, BlockConditions):
        local = None if value.local_BLD is None else value.local_BLD.to(dtype)
        return dataclasses.replace(value, context=tuple(each.to(dtype) for each in value.context), local_BLD=local)
    return value


def _cast_inputs(layer: nn.Module) -> None:
    """Have `layer` take its inputs, whatever they come in, in the dtype of its weights."""

    def own(value: Any) -> Any:
        return _to(value, next(layer.parameters()).dtype)

    layer.register_forward_pre_hook(lambda _, inputs: tuple(map(own, inputs)))
    if isinstance(layer, Block):  # called directly too, once per request
        prepare = layer.prepare
        layer.prepare = lambda conditions, layout: prepare(own(conditions), layout)  # type: ignore[method-assign]
