"""The generator: a loaded model, its stack of adapters, and `generate` in all three modes."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from sa3train.adapters.adapter import Adapter
from sa3train.adapters.apply.load_report import LoadReport
from sa3train.adapters.apply.stack import AdapterStack
from sa3train.adapters.formats.io import load_adapter
from sa3train.core.device import choose_device
from sa3train.core.device_errors import explain_device_errors
from sa3train.core.errors import ConfigError, GenerationError
from sa3train.core.log import get_logger
from sa3train.core.mapped import map_tensor
from sa3train.diffusion.samplers import Callback
from sa3train.inference.checks import check_generation
from sa3train.inference.clip import generate_clip
from sa3train.inference.decoding import collect_warnings
from sa3train.inference.input_audio import CHANNELS, load_input_audio
from sa3train.inference.loops import generate_loops
from sa3train.inference.mastering import FinishedAudio, finish_audio
from sa3train.inference.openvino_step import check_backend, run_on_openvino
from sa3train.inference.outputs import GenerationOutput
from sa3train.inference.resolve import ModelFacts, ResolvedSettings
from sa3train.inference.runtime import choose_dtype, suggest_generation_fixes
from sa3train.inference.sampling import Generation
from sa3train.inference.settings import AUDIO_SETTINGS, SETTING_NAMES, GenerationSettings
from sa3train.inference.sidecar import describe_adapter, describe_environment
from sa3train.inference.windows import generate_windows, open_work_dir
from sa3train.models.checkpoint import StableAudio3, load_checkpoint
from sa3train.models.dit import compile_blocks
from sa3train.models.fp16_check import convert_to_fp16
from sa3train.models.int8_linear import quantize_linears

logger = get_logger(__name__)

EXECUTION_OPTIONS = ("compiled", "cuda_graphs")
"""Attributes of a generator that its sidecars record where they are on."""


class Generator:
    """Generates audio with one model and any number of adapters.

    All random draws come from one CPU generator, on every device.

    Args:
        model: The loaded model.
        precision: What it was loaded in, for sidecars.
        source: Name or folder to load it from again, for sidecars; None for the model's own path.
    """

    def __init__(self, model: StableAudio3, precision: str = "fp32", source: str | None = None) -> None:
        self.model = model
        self.source = source or str(model.path)
        self.precision = precision
        self.compiled = self.cuda_graphs = False
        self.backend = "torch"
        self.stack = AdapterStack(model.get_adapter_root(), decoder=model.get_adapter_root("decoder"))
        self._files: list[dict[str, Any]] = []
        self.facts = ModelFacts.from_config(model.config, model.name)

    def __repr__(self) -> str:
        return f"Generator({self.source!r}, {self.precision} on {self.device}, {len(self.stack)} adapters)"

    @classmethod
    @torch.inference_mode(False)
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        device: str | torch.device | None = None,
        precision: str = "auto",
        *,
        compiled: bool = False,
        cuda_graphs: bool = False,
        backend: str = "torch",
    ) -> "Generator":
        """Load a model by name or folder.

        Args:
            name: Name such as "nano" or "medium-base", or a folder.
            device: "cpu", "cuda", "cuda:1", "xpu" or "mps"; None or "auto" for the best that works.
            precision: "fp32", "bf16", "fp16" (layers that are inaccurate in it stay in fp32, which is logged), "int8"
                (the denoiser's products, on a CPU), or "auto": what the device computes fastest, measured once.
            compiled: Whether to compile the denoiser's blocks, see `compile_blocks`: pays off over many generations.
            cuda_graphs: Whether to capture the denoiser's step as a CUDA graph, which replays from the third step on.
            backend: What computes the denoiser's steps: "torch", or "openvino" on a CPU, see `run_on_openvino`.

        Returns:
            The generator.

        Raises:
            CheckpointError: When the model cannot be loaded.
            ConfigError: When the device or precision is not available.
            MemoryShortageError: When the model does not fit on the device.
        """
        target = choose_device(device)
        if cuda_graphs and target.type != "cuda":
            raise ConfigError(f"cuda_graphs has no effect on {target.type}. Remove it, or use a CUDA device.")
        if compiled and precision == "int8":
            raise ConfigError("compiled has no effect on precision=int8, whose products are not torch's. Remove one.")
        chosen, dtype = choose_dtype(precision, target)
        check_backend(backend, target, chosen, compiled)
        with explain_device_errors(
            target, f"loading {os.fspath(name)} in {chosen}", suggest_generation_fixes(target, chosen)
        ):
            if dtype is torch.float16:
                model = load_checkpoint(name, "cpu")
                convert_to_fp16(model, target)
            else:
                model = load_checkpoint(name, target, dtype, lazy_encoder=True)
        if chosen == "int8":
            quantize_linears(model.dit.transformer.layers)
        generator = cls(model, chosen, os.fspath(name))
        generator.cuda_graphs = cuda_graphs
        if compiled:
            compile_blocks(generator.model.dit)
            generator.compiled = True
        if backend == "openvino":
            run_on_openvino(model.dit, model.conditioner.max_length + 1)
            generator.backend = backend
        return generator

    @property
    def device(self) -> torch.device:
        """The device that the model computes on."""
        return next(self.model.dit.parameters()).device

    @property
    def adapters(self) -> list[dict[str, Any]]:
        """The loaded adapters in order: path, sha256, strengths, interval, excluded layers."""
        return [file | settings for file, settings in zip(self._files, self.stack.settings, strict=True)]

    def load_adapter(
        self,
        adapter: str | os.PathLike[str] | Adapter,
        strength: float | tuple[float, float] = 1.0,
        *,
        conditioner_strength: float | None = None,
        interval: tuple[float, float] = (0.0, 1.0),
        exclude_layers: Sequence[str] | str = (),
        allow_partial: bool = False,
    ) -> LoadReport:
        """Add an adapter to those already loaded, on the DiT or, as its layers say, on the autoencoder's decoder.

        Args:
            adapter: File, folder or name of an adapter, or the adapter itself.
            strength: 0 is the bare model, 1 the adapter as trained; (start, end) changes it from the first window of a
                piece to its last.
            conditioner_strength: Strength in the conditioner; None for the same.
            interval: Noise levels (low, high) at which the adapter acts, ends included; not for the decoder.
            exclude_layers: Substrings of layers to leave untouched, with ranges such as "layers.[0-5]".
            allow_partial: Whether to load an adapter of which only some layers match.

        Returns:
            What matched the model and how much it changes the weights.

        Raises:
            AdapterError: When the adapter does not fit the model.
        """
        loaded = adapter if isinstance(adapter, Adapter) else load_adapter(adapter)
        with explain_device_errors(
            self.device, "loading an adapter", suggest_generation_fixes(self.device, self.precision)
        ):
            report = self.stack.add(
                loaded,
                strength,
                conditioner_strength=conditioner_strength,
                interval=interval,
                exclude_layers=exclude_layers,
                allow_partial=allow_partial,
                base=self.model,
            )
        if conditioner_strength is not None and not any(path.startswith("conditioners.") for path in report.matched):
            logger.warning(
                "conditioner_strength=%g has no effect: %s changes no layer of the conditioner.",
                conditioner_strength,
                loaded.source or "the adapter",
            )
        self._files.append(describe_adapter(adapter, loaded))
        return report

    def set_strength(
        self,
        strength: float | tuple[float, float],
        adapter: int | None = None,
        conditioner_strength: float | None = None,
    ) -> None:
        """Set the strength of one adapter or of all.

        Args:
            strength: 0 turns it off without unloading it; (start, end) changes it over a piece.
            adapter: Index of the adapter; None for all.
            conditioner_strength: Strength in the conditioner; None for the same.
        """
        self.stack.set_strength(strength, adapter, conditioner_strength)

    def remove_adapter(self, adapter: int) -> None:
        """Unload an adapter; the model is as if it had never been loaded.

        Args:
            adapter: Its index; adapters after it move up.
        """
        self.stack.remove(adapter)
        del self._files[adapter]

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str | None] | None = None,
        duration: float | Sequence[float] = 30.0,
        bars: int | None = None,
        bpm: float | None = None,
        meter: str = "4/4",
        loop: bool = False,
        tail: float = 6.0,
        window: float | None = None,
        prompt_at: Sequence[tuple[float, str]] | None = None,
        batch_size: int = 1,
        seed: int = -1,
        steps: int | None = None,
        sampler_type: str | None = None,
        cfg_scale: float | None = None,
        cfg_interval: tuple[float, float] = (0.0, 1.0),
        cfg_norm_threshold: float = 0.0,
        scale_phi: float = 0.0,
        apg_scale: float = 1.0,
        init_audio: Any = None,
        init_noise_level: float = 0.9,
        inpaint_audio: Any = None,
        inpaint_mask_start_seconds: float | Sequence[float] | None = None,
        inpaint_mask_end_seconds: float | Sequence[float] | None = None,
        keep_exact: bool = False,
        chunked_decode: bool | None = None,
        loudness: float | None = None,
        peak: float | None = None,
        return_latents: bool = False,
        generator: torch.Generator | None = None,
        callback: Callback | None = None,
        work_dir: str | os.PathLike[str] | None = None,
    ) -> GenerationOutput:
        """Generate one item, or a batch: lists of prompts, negative prompts and durations give one value per item.

        inference/README.md lists every setting with its default, range and meaning. Times are in seconds.

        Args:
            prompt, negative_prompt, duration, batch_size: What to generate; see `GenerationSettings`.
            bars, bpm, meter, loop, tail: A length in bars in place of a duration, loops, and room behind the end.
            prompt_at, window: Pairs of seconds and prompt for a piece whose prompt changes; length of its windows.
            seed, steps, sampler_type: Sampling; None for the model's default, seed -1 for a random one.
            cfg_scale, cfg_interval, cfg_norm_threshold, scale_phi, apg_scale: Guidance.
            init_audio, init_noise_level: Audio to start from, 0 keeps it and 1 replaces it by noise.
            inpaint_audio, inpaint_mask_start_seconds, inpaint_mask_end_seconds, keep_exact: Audio to regenerate in
                regions or to continue.
            chunked_decode: Whether to decode in chunks; None as the model's config says.
            loudness, peak: Level in LUFS and true peak in dBTP; None leaves them.
            return_latents, generator, callback, work_dir: As in `generate_from`.

        Returns:
            The audio, with what its sidecar will record.
        """
        given = locals()
        settings = GenerationSettings(**{name: given[name] for name in SETTING_NAMES})
        by_run = {name: given[name] for name in ("return_latents", "generator", "callback", "work_dir")}
        return self.generate_from(settings, **by_run)

    def generate_from(
        self,
        settings: GenerationSettings,
        *,
        return_latents: bool = False,
        generator: torch.Generator | None = None,
        callback: Callback | None = None,
        work_dir: str | os.PathLike[str] | None = None,
    ) -> GenerationOutput:
        """Generate from settings, as `generate` does from keywords.

        Args:
            settings: What to generate.
            return_latents: Whether the output holds latents too.
            generator: CPU generator to draw from instead of the seed.
            callback: Called as `callback(step, total, sigma, denoised_BCT)` after each step; may raise to cancel.
            work_dir: Where finished windows of a piece are kept, and its temporary files (else in TMPDIR or /var/tmp);
                the same call continues with them. The caller removes it when the audio is saved.

        Returns:
            The audio, with what its sidecar will record.

        Raises:
            GenerationError: When the model cannot do what is asked, or a setting would have no effect.
            AudioError: When input audio is unusable.
            MemoryShortageError: When the generation does not fit on the device.
        """
        if generator is not None and generator.device.type != "cpu":
            raise GenerationError("generator must be a CPU generator: all draws are made on the CPU, for every device.")
        resolved = check_generation(settings, self.facts, self.adapters, has_generator=generator is not None)
        inputs = {
            role: load_input_audio(getattr(resolved, role), self.facts.sample_rate, role)
            for role in AUDIO_SETTINGS
            if getattr(resolved, role) is not None
        }
        rng = torch.Generator().manual_seed(resolved.seed or 0) if generator is None else generator
        generation = Generation(self.model, self.facts, resolved, inputs, rng)
        folder = None if work_dir is None or resolved.window is None else Path(work_dir)
        if folder is not None:
            resolved = replace(resolved, seed=open_work_dir(folder, self._record(generation), settings.seed != -1))
            generation = replace(generation, settings=resolved)
        for excess in (excesses := self.stack.list_excesses()):  # before the audio, which may not be finite
            logger.warning(excess)
        fixes = suggest_generation_fixes(self.device, self.precision, resolved, self.cuda_graphs)
        with torch.no_grad(), explain_device_errors(self.device, f"generating {_describe(resolved)}", fixes):
            latents_BCT, finished = self._render(generation, folder, callback)
        clipped_shares = [each.clipped_share for each in finished]
        warnings = collect_warnings(generation, clipped_shares)
        for warning in warnings:
            logger.warning(warning)
        return GenerationOutput(
            audio=[each.audio_CN for each in finished],
            sample_rate=self.facts.sample_rate,
            seeds=[resolved.seed] * resolved.batch_size,
            latents=latents_BCT.cpu() if return_latents else None,
            clipped_shares=clipped_shares,
            measured=[each.measured for each in finished],
            warnings=[*excesses, *warnings],
            record=self._record(generation),
        )

    def _render(
        self, generation: Generation, folder: Path | None, callback: Callback | None
    ) -> tuple[Tensor, list[FinishedAudio]]:
        """Latents, and the audio of each item."""
        settings = generation.settings
        self.stack.apply(None)  # the decoder's adapters have no noise level, and sampling may be left out
        if settings.window is not None:
            latents_BCT, audio = generate_windows(generation, self.stack, folder, callback, self.cuda_graphs)
        else:
            _check_memory(settings, self.facts)
            generate = generate_loops if settings.loop else generate_clip
            latents_BCT, audio = generate(generation, self.stack, callback, self.cuda_graphs)
        rate, limits_piece = self.facts.sample_rate, settings.window is not None and settings.peak is not None
        second = map_tensor((CHANNELS, audio[0].shape[1]), folder) if limits_piece else None  # where the limiter writes
        return latents_BCT, [finish_audio(audio_CN, settings, rate, second) for audio_CN in audio]

    def _record(self, generation: Generation) -> dict[str, Any]:
        """What the sidecars of all items share."""
        return {
            "model": {
                "name": self.model.name,
                "source": self.source,
                "fingerprint": self.model.fingerprint(),
                "autoencoder": self.model.autoencoder.fingerprint(),
            },
            "precision": self.precision,
            "settings": generation.settings.to_dict(),
            "inputs": {
                role: generation.inputs[role].to_dict() if role in generation.inputs else None
                for role in AUDIO_SETTINGS
            },
            "adapters": self.adapters,
            "environment": describe_environment(self.device)
            | {option: True for option in EXECUTION_OPTIONS if getattr(self, option)}
            | ({} if self.backend == "torch" else {"backend": self.backend}),
        }


def _check_memory(settings: ResolvedSettings, facts: ModelFacts) -> None:
    """Refuse what can never fit: the system would kill the process, without a word."""
    samples = settings.batch_size * max(settings.duration) * facts.sample_rate
    if 4 * samples * CHANNELS * torch.float32.itemsize > psutil.virtual_memory().total:  # decoded, cut, clamped, copied
        raise MemoryError


def _describe(settings: ResolvedSettings) -> str:
    count, seconds = settings.batch_size, max(settings.duration)
    return f"{seconds:g} s" if count == 1 else f"{count} items of up to {seconds:g} s"
