"""The generator: a loaded model, its stack of adapters, and `generate` in all three modes.

Shapes: B items, C latent channels, T latent frames, N samples; t = 1 is noise, t = 0 is data.
"""

import os
from collections.abc import Sequence
from typing import Any

import torch

from sa3train.adapters.adapter import Adapter
from sa3train.adapters.apply.load_report import LoadReport
from sa3train.adapters.apply.stack import AdapterStack
from sa3train.adapters.formats.io import load_adapter
from sa3train.adapters.layer_filter import split_patterns
from sa3train.core.device import drawn_ahead, memory_named
from sa3train.core.errors import ConfigError, RequestError
from sa3train.core.log import get_logger
from sa3train.diffusion.samplers import Callback
from sa3train.inference.input_audio import Source, load_source
from sa3train.inference.outputs import GenerationOutput
from sa3train.inference.request import DEFAULT_DURATION, ModelFacts, Request, build_request, described
from sa3train.inference.runtime import choose_device, choose_dtype, compile_blocks, what_helps
from sa3train.inference.sampling import (
    decode_audio,
    draws_to_come,
    sample_latents,
    starting_point,
    truncated_prompts,
    warnings_of,
)
from sa3train.inference.sidecar import adapter_record, environment
from sa3train.models.checkpoint import StableAudio3, load_checkpoint
from sa3train.models.fp16_check import settle_in_fp16

logger = get_logger(__name__)

WAYS = ("compiled", "cuda_graphs")
"""Attributes of a generator that a sidecar names where they are on."""


class Generator:
    """Generates audio with one model and any number of adapters. Every draw comes from one CPU torch generator."""

    def __init__(self, model: StableAudio3, precision: str = "fp32", source: str | None = None) -> None:
        """Play `model` as it is loaded; sidecars name its `precision` and the `source` to load it from again."""
        self.model = model
        self.source = source or str(model.path)
        self.precision = precision
        self.compiled = self.cuda_graphs = False
        self.stack = AdapterStack(model.adaptable())
        self._records: list[dict[str, Any]] = []
        self.facts = ModelFacts(
            model.name, model.objective, model.sample_rate, model.downsampling_ratio, model.max_frames
        )

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        device: str | torch.device | None = None,
        precision: str = "auto",
        *,
        compiled: bool = False,
        cuda_graphs: bool = False,
    ) -> "Generator":
        """Load a model by name or folder. `device` None takes CUDA or MPS when present, else the CPU.

        `precision` is "fp32", "bf16", "fp16" (but for layers that are not good enough in it, which are tried first and
        named in the log), or "auto": what the device computes fastest, measured once. `compiled`
        has torch compile the denoiser's blocks (see `compile_blocks`): for many requests, not for the first.
        `cuda_graphs` sends a step's kernels to a CUDA device as one, from a request's third step on. Raises
        `CheckpointError` when the model cannot be loaded, `ConfigError` for a device or precision that cannot be had,
        `MemoryShortageError` when the device does not hold it.
        """
        place = choose_device(device)
        if cuda_graphs and place.type != "cuda":
            raise ConfigError(f"CUDA graphs have no effect on {place.type}: leave them out, or use a CUDA device.")
        chosen, dtype = choose_dtype(precision, place)
        with memory_named(place, f"loading {os.fspath(name)} in {chosen}", what_helps(place, chosen)):
            if dtype is torch.float16:
                model = load_checkpoint(name, "cpu")
                settle_in_fp16(model, place)
            else:
                model = load_checkpoint(name, place, dtype, encoder_later=True)
        generator = cls(model, chosen, os.fspath(name))
        generator.cuda_graphs = cuda_graphs
        if compiled:
            compile_blocks(generator.model.dit)
            generator.compiled = True
        return generator

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return next(self.model.dit.parameters()).device

    @property
    def adapters(self) -> list[dict[str, Any]]:
        """What is loaded, in order: path, sha256, strengths, interval, layers switched off."""
        return [dict(record) for record in self._records]

    def load_adapter(
        self,
        adapter: str | os.PathLike[str] | Adapter,
        strength: float = 1.0,
        *,
        conditioner_strength: float | None = None,
        interval: tuple[float, float] = (0.0, 1.0),
        exclude_layers: Sequence[str] | str = (),
        allow_partial: bool = False,
    ) -> LoadReport:
        """Add an adapter to those already loaded; earlier ones stay.

        `conditioner_strength` None means `strength`. `interval`: noise levels (ends inclusive) at which it acts.
        `exclude_layers`: substrings of layers to leave untouched, with ranges as `layers.[0-5]`. Raises `AdapterError`
        when it does not fit the model; when only some layers match, unless `allow_partial`.
        """
        loaded = adapter if isinstance(adapter, Adapter) else load_adapter(adapter)
        excluded = split_patterns(exclude_layers)
        with memory_named(self.device, "loading an adapter", what_helps(self.device, self.precision)):
            report = self.stack.add(
                loaded,
                strength,
                conditioner_strength=conditioner_strength,
                interval=interval,
                exclude_layers=excluded,
                allow_partial=allow_partial,
                base=self.model,
            )
        self._records.append(
            {
                **adapter_record(adapter, loaded),
                "strength": strength,
                "conditioner_strength": conditioner_strength,
                "interval": list(interval),
                "exclude_layers": list(excluded),
                "allow_partial": allow_partial,
            }
        )
        return report

    def set_strength(
        self, strength: float, adapter: int | None = None, conditioner_strength: float | None = None
    ) -> None:
        """Set the strength of the adapter at index `adapter`, or of all. 0 turns it off without unloading it."""
        self.stack.set_strength(strength, adapter, conditioner_strength)
        for record in self._records if adapter is None else [self._records[adapter]]:
            record.update(strength=strength, conditioner_strength=conditioner_strength)

    def remove_adapter(self, adapter: int) -> None:
        """Unload the adapter at index `adapter`; those after it move up. The model is as it was without it."""
        self.stack.remove(adapter)
        del self._records[adapter]

    def replace_adapter(self, index: int, adapter: str | os.PathLike[str] | Adapter) -> LoadReport:
        """Put another adapter in the place of the one at `index`, with its strengths, interval and excluded layers."""
        loaded = adapter if isinstance(adapter, Adapter) else load_adapter(adapter)
        report = self.stack.replace(index, loaded)
        self._records[index].update(adapter_record(adapter, loaded))
        return report

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str | None] | None = None,
        duration: float | Sequence[float] = DEFAULT_DURATION,
        steps: int | None = None,
        cfg_scale: float | None = None,
        seed: int = -1,
        batch_size: int = 1,
        init_audio: Any = None,
        init_noise_level: float = 1.0,
        inpaint_audio: Any = None,
        inpaint_mask_start_seconds: float | Sequence[float] | None = None,
        inpaint_mask_end_seconds: float | Sequence[float] | None = None,
        keep_exact: bool = False,
        chunked_decode: bool | None = None,
        apg_scale: float = 1.0,
        cfg_interval: Sequence[float] = (0.0, 1.0),
        cfg_norm_threshold: float = 0.0,
        scale_phi: float = 0.0,
        sampler_type: str | None = None,
        return_latents: bool = False,
        generator: torch.Generator | None = None,
        callback: Callback | None = None,
    ) -> GenerationOutput:
        """Generate one item, or a batch: lists of prompts, negative prompts and durations give one value per item.

        Open settings take the model's defaults: 50 steps, guidance 7, Euler on base models; 8, 1, ping-pong on
        post-trained ones. Times are in seconds. `init_audio` and `inpaint_audio` are a path, `(sample_rate, tensor)`
        or `(tensor, sample_rate)`; with both, sampling starts from the first and keeps what it must of the second.
        `init_noise_level`: 0 keeps the audio, 1 replaces it by noise. Inpainting generates anew from start to end, one
        region or a list of them; the rest is context that the model copies, or with `keep_exact` is decoded from its
        own latents. `chunked_decode` None does as the model's config says. `seed` -1 is a random one; `generator` (on
        the CPU) takes its place. `callback(step, total, sigma, denoised)` may raise to cancel.

        Raises `RequestError` for a request that cannot be met or a setting without effect, `AudioError` for unusable
        audio, `MemoryShortageError` when the device does not hold what is asked for.
        """
        if generator is not None and generator.device.type != "cpu":
            raise RequestError("generator must be a CPU generator: every draw is made there, on all devices.")
        init = None if init_audio is None else load_source(init_audio, self.facts.sample_rate, "init_audio")
        inpaint = None if inpaint_audio is None else load_source(inpaint_audio, self.facts.sample_rate, "inpaint_audio")
        request = build_request(
            self.facts,
            prompt=prompt,
            negative_prompt=negative_prompt,
            duration=duration,
            steps=steps,
            cfg_scale=cfg_scale,
            cfg_interval=cfg_interval,
            cfg_norm_threshold=cfg_norm_threshold,
            apg_scale=apg_scale,
            scale_phi=scale_phi,
            sampler_type=sampler_type,
            seed=seed,
            batch_size=batch_size,
            with_init_audio=init is not None,
            init_noise_level=init_noise_level,
            with_inpaint_audio=inpaint is not None,
            inpaint_mask_start_seconds=inpaint_mask_start_seconds,
            inpaint_mask_end_seconds=inpaint_mask_end_seconds,
            keep_exact=keep_exact,
            chunked_decode=chunked_decode,
            own_generator=generator is not None,
        )
        if generator is None:
            generator = torch.Generator().manual_seed(request.seed or 0)
        remedies = what_helps(self.device, self.precision, request, self.cuda_graphs)
        with torch.no_grad(), memory_named(self.device, f"generating {described(request)}", remedies):
            start = starting_point(self.model, self.facts, request, init, inpaint, generator)
            with drawn_ahead(generator, draws_to_come(self.model, request, start), self.device):
                latents_BCT = sample_latents(
                    self.model, self.facts, self.stack, request, start, generator, callback, self.cuda_graphs
                )
                audio, shares = decode_audio(self.model, self.facts, request, latents_BCT, generator)
        warnings = [
            *truncated_prompts(self.model, request),
            *warnings_of(self.facts, request, init, inpaint, shares),
        ]
        for warning in warnings:
            logger.warning(warning)
        return GenerationOutput(
            audio=audio,
            sample_rate=self.facts.sample_rate,
            seeds=[request.seed] * request.batch_size,
            latents=latents_BCT.cpu() if return_latents else None,
            clipped_shares=shares,
            warnings=warnings,
            record=self._record(request, init, inpaint),
        )

    def _record(self, request: Request, init: Source | None, inpaint: Source | None) -> dict[str, Any]:
        return {
            "model": {
                "name": self.model.name,
                "source": self.source,
                "fingerprint": self.model.fingerprint(),
                "autoencoder": self.model.autoencoder.fingerprint(),
            },
            "precision": self.precision,
            "settings": request.settings(),
            "inputs": {
                "init_audio": None if init is None else init.record(),
                "inpaint_audio": None if inpaint is None else inpaint.record(),
            },
            "adapters": self.adapters,
            "environment": environment(self.device) | {way: True for way in WAYS if getattr(self, way)},
        }
