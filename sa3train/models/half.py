"""fp16 only where it is as good as fp32: each layer of a model is tried on what it meets, and kept wide where it fails.

fp16 ends at 65504 and has 11 significant bits: a layer with larger numbers inside, or in what it passes on, makes
infinity of them. The model runs in fp32 on a fixed input; every block of the denoiser then runs in fp16 on the very
inputs it had, and is compared. What fails is kept in bf16 on a GPU that has it, else in fp32. The autoencoder is tried
as a whole, and so is the denoiser once its blocks are settled.

Shapes: B items, C latent channels, T latent frames, L text tokens, D widths.
"""

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sa3train.log import get_logger
from sa3train.models.checkpoint import StableAudio3
from sa3train.models.conditioners import TextEmbedding
from sa3train.models.dit import Block, BlockConditions, Conditions, Modulation
from sa3train.transfer import widest

logger = get_logger(__name__)

ERROR = 0.01
"""The most that a layer's output in fp16 may differ, as a share of its length in fp32; bf16 differs by about 0.004."""
LARGEST = torch.finfo(torch.float16).max
_FRAMES, _TOKENS, _LEVELS = 64, 16, (0.95, 0.5, 0.1)


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


@torch.no_grad()
def settle_in_fp16(model: StableAudio3) -> list[Verdict]:
    """Turn `model`, loaded in fp32, into fp16 but for the layers that fail; say in the log which. The verdicts of all.

    One input is tried; another may still meet a number that is too large, which generating reports as an error.
    """
    device = model.dit.transformer.memory_tokens.device
    wide = wide_dtype(device)
    verdicts = [*_settle_denoiser(model, wide), *_settle_autoencoder(model, wide)]
    model.conditioner.half()
    kept = [str(verdict) for verdict in verdicts if verdict.kept_wide]
    worst = max((verdict.error for verdict in verdicts if not verdict.kept_wide), default=0.0)
    limit = f"each within {worst:.2%} of fp32, where {ERROR:.0%} is allowed"
    logger.info("fp16 in %d of %d layers, %s", len(verdicts) - len(kept), len(verdicts), limit)
    if kept:
        logger.warning("not good enough in fp16, so kept in %s: %s", str(wide).removeprefix("torch."), "; ".join(kept))
    return verdicts


def wide_dtype(device: torch.device) -> torch.dtype:
    """What failing layers are kept in: bf16, which has fp32's range, where a GPU computes it, else fp32."""
    cuda = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if cuda else torch.float32


def _settle_denoiser(model: StableAudio3, wide: torch.dtype) -> list[Verdict]:
    dit = model.dit
    layers: dict[str, nn.Module] = {f"block {index}": block for index, block in enumerate(dit.transformer.layers)}
    layers["project_out"] = dit.transformer.project_out
    watched = {name: _Watched(layer) for name, layer in layers.items()}
    forward = _fixed_input(model)
    exact_BCT = forward()
    verdicts = [watched[name].verdict(name) for name in layers]
    kept = [layers[verdict.layer] for verdict in verdicts if verdict.kept_wide]
    _cast(dit, torch.float16, {id(tensor): wide for layer in kept for tensor in _tensors(layer)})
    if kept:
        for layer in layers.values():
            _cast_inputs(layer)
        dit.transformer.project_out.register_forward_hook(lambda _, inputs, output: output.to(dit.dtype))
    whole = Verdict("the denoiser as a whole", _error(forward(), exact_BCT))
    if whole.kept_wide:
        dit.to(wide)
    return [*verdicts, whole]


def _settle_autoencoder(model: StableAudio3, wide: torch.dtype) -> list[Verdict]:
    autoencoder = model.autoencoder
    if autoencoder is None:
        return []
    device = autoencoder.device
    seeded = torch.Generator().manual_seed(0)
    z_BCT = torch.randn(1, model.latent_channels, _FRAMES, generator=seeded).to(device)
    watched = _Watched(autoencoder, inputs=False)
    audio_BCN = autoencoder.decode(z_BCT, noise=False)
    exact_BCT = autoencoder.encode(audio_BCN, noise=False)
    watched.stop()
    trial = copy.deepcopy(autoencoder).half()
    errors = [
        _error(trial.decode(z_BCT, noise=False), audio_BCN),
        _error(trial.encode(audio_BCN, noise=False), exact_BCT),
    ]
    verdict = Verdict("the autoencoder", max(errors, key=lambda error: (error != error, error)), watched.largest)
    autoencoder.to(wide if verdict.kept_wide else torch.float16)
    return [verdict]


class _Watched:
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

    def verdict(self, name: str) -> Verdict:
        """The layer's output in fp16 for the same inputs, compared."""
        self.stop()
        trial = copy.deepcopy(self.layer).half()
        found = trial(*(_to(value, torch.float16) for value in self.inputs))
        return Verdict(name, _error(found, self.output), self.largest)

    def _see(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        for tensor in (*inputs, output):
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.numel():
                largest = tensor.abs().max().item()
                self.largest = largest if largest != largest else max(self.largest, largest)

    def _keep(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        self.inputs, self.output = inputs, output


def _fixed_input(model: StableAudio3) -> Callable[[], Tensor]:
    """The denoiser's velocity (B, C, T) on seeded noise at three noise levels, with a seeded text."""
    config, seeded = model.config.dit, torch.Generator().manual_seed(0)
    device = model.dit.transformer.memory_tokens.device
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


def _error(found: Tensor, exact: Tensor) -> float:
    """‖found − exact‖ / ‖exact‖; not a number when `found` has one that is none."""
    wide = widest(exact.device)
    return ((found.to(wide) - exact.to(wide)).norm() / exact.to(wide).norm().clamp(min=1e-12)).item()


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


def _tensors(root: nn.Module) -> list[Tensor]:
    return [*root.parameters(), *root.buffers()]


def _cast(root: nn.Module, dtype: torch.dtype, others: dict[int, torch.dtype]) -> None:
    """Cast all of `root` to `dtype` but for the tensors in `others` (by id), which get their own."""
    for tensor in _tensors(root):
        tensor.data = tensor.data.to(others.get(id(tensor), dtype))


def _cast_inputs(layer: nn.Module) -> None:
    """Have `layer` take its inputs, whatever they come in, in the dtype of its weights."""

    def own(value: Any) -> Any:
        return _to(value, next(layer.parameters()).dtype)

    layer.register_forward_pre_hook(lambda _, inputs: tuple(map(own, inputs)))
    if isinstance(layer, Block):  # called directly too, once per request
        prepare = layer.prepare
        layer.prepare = lambda conditions, layout: prepare(own(conditions), layout)  # type: ignore[method-assign]
