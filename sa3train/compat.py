"""The classes of the released project, `StableAudioModel` and `AutoencoderModel`, on top of `sa3train.Generator`.

Code that was written for it runs with another import: `from sa3train.compat import StableAudioModel`. Its calls and
defaults are kept (120 s, 8 steps, no guidance, `init_noise_level=1`). What it ignores, and `Generator` refuses, is
left out with a warning.
"""

import copy
import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sa3train.adapters.apply.svd_basis import attach_bases
from sa3train.adapters.formats.io import load_adapter
from sa3train.adapters.spec import KINDS
from sa3train.adapters.tools.base_weights import get_weights
from sa3train.audio.edit import fit, mix_channels
from sa3train.audio.io import check_audio
from sa3train.audio.resample import RELEASED, resample
from sa3train.core.device import choose_device, move_to_device
from sa3train.core.errors import GenerationError
from sa3train.core.log import get_logger
from sa3train.inference.generator import Generator
from sa3train.inference.settings import GUIDANCE_SETTINGS, GenerationSettings, check_number, get_default, is_list
from sa3train.models.autoencoder import CHUNK_SIZE, OVERLAP, Autoencoder
from sa3train.models.checkpoint import load_autoencoder

__all__ = ["AutoencoderModel", "StableAudioModel"]

_logger = get_logger(__name__)


class StableAudioModel:
    """Generates audio, with the calls of the released project's class of this name.

    Args:
        generator: The generator to use. Its adapters are applied by the released code's rule.
    """

    def __init__(self, generator: Generator) -> None:
        self.generator = generator
        generator.stack.semantics = "reference"

    @classmethod
    def from_pretrained(
        cls, model_name: str | os.PathLike[str], device: str | torch.device | None = None, model_half: bool = True
    ) -> "StableAudioModel":
        """Load a model by name or folder.

        Args:
            model_name: Name such as "medium", or a folder.
            device: Such as "cuda"; None for the best that works.
            model_half: Whether to load it in fp16 on CUDA; elsewhere it is fp32.

        Returns:
            The model.
        """
        target = choose_device(device)
        precision = "fp16" if model_half and target.type == "cuda" else "fp32"
        return cls(Generator.from_pretrained(model_name, target, precision))

    @property
    def device(self) -> torch.device:
        """The device that the model computes on."""
        return self.generator.device

    @property
    def sample_rate(self) -> int:
        """Sample rate in Hz."""
        return self.generator.facts.sample_rate

    def load_lora(
        self,
        lora_ckpt_paths: Sequence[str | os.PathLike[str]] | str | os.PathLike[str],
        svd_bases_path: str | os.PathLike[str] | None = None,
    ) -> None:
        """Load adapters in addition to those already loaded.

        Args:
            lora_ckpt_paths: Their files; what `Generator.load_adapter` reads besides (PEFT, ComfyUI) is read too.
            svd_bases_path: `svd_bases.pt` for the -xs types among them; None computes their bases from the model.
        """
        paths = [lora_ckpt_paths] if isinstance(lora_ckpt_paths, str | os.PathLike) else lora_ckpt_paths
        for path in paths:
            adapter = load_adapter(path)
            kind = KINDS.get(adapter.spec.adapter_type)
            if svd_bases_path is not None and kind is not None and kind.is_xs:
                untouched = None if self.generator.adapters else get_weights(self.generator.model)
                adapter = attach_bases(adapter, svd_bases_path, untouched)
            self.generator.load_adapter(adapter)

    def set_lora_strength(self, strength: float, lora_index: int | None = None) -> None:
        """Set the strength of one adapter or of all.

        Args:
            strength: 0 turns it off without unloading it, 1 is as trained.
            lora_index: Index of the adapter; None for all.
        """
        self.generator.set_strength(strength, lora_index)

    def generate(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        duration: float | Sequence[float] = 120,
        steps: int = 8,
        cfg_scale: float = 1.0,
        batch_size: int = 1,
        *,
        truncate_output_to_duration: bool = True,
        seed: int = -1,
        init_audio: Any = None,
        init_noise_level: float = 1.0,
        inpaint_audio: Any = None,
        inpaint_mask_start_seconds: float | Sequence[float] | None = None,
        inpaint_mask_end_seconds: float | Sequence[float] | None = None,
        duration_padding_sec: float = GenerationSettings.tail,
        return_latents: bool = False,
        chunked_decode: bool | None = None,
        **sampling: Any,
    ) -> Tensor:
        """Generate audio.

        Args:
            prompt, negative_prompt, duration, batch_size: What to generate: one value for all items or a list with one
                for each. Without a prompt the text is empty.
            steps, cfg_scale, seed: Sampling; seed -1 is random.
            truncate_output_to_duration: Whether to cut the audio to its duration; False leaves the padding.
            init_audio, inpaint_audio: Audio as `(sample_rate, array)`, `(array, sample_rate)` or a path. NumPy arrays
                may be (samples, channels) as Gradio gives them; whole numbers are scaled by their range.
            init_noise_level: 1 replaces `init_audio` by noise.
            inpaint_mask_start_seconds, inpaint_mask_end_seconds: Regions to regenerate.
            duration_padding_sec: Seconds that are generated beyond the duration.
            return_latents: Whether to return latents instead of audio.
            chunked_decode: Whether to decode in chunks; None as the model's config says.
            **sampling: `sampler_type`, `cfg_interval`, `cfg_norm_threshold`, `scale_phi`, `apg_scale`.

        Returns:
            Audio (B, 2, N) in float32 on the CPU, items that are shorter than the longest padded with silence; or
            latents (B, C, T).

        Raises:
            GenerationError: As `Generator.generate`, and for arguments of the released project that are not offered.
        """
        _check_sampling(sampling)
        settings = {
            **sampling,
            "prompt": _fill_prompts(_to_plain(prompt)),
            **{"negative_prompt": negative_prompt, "duration": self._limit_duration(duration)},
            **{"steps": steps, "cfg_scale": cfg_scale, "batch_size": batch_size, "seed": seed},
            "chunked_decode": chunked_decode,
            **_prepare_audio(init_audio, init_noise_level),
        }
        start, end = inpaint_mask_start_seconds, inpaint_mask_end_seconds
        settings |= _prepare_regions(inpaint_audio, start, end, settings["duration"])
        settings["tail"] = _check_padding(duration_padding_sec)
        generator = copy.copy(self.generator)  # which shares the model and the adapters
        generator.facts = dataclasses.replace(generator.facts, keeps_tail=not truncate_output_to_duration)
        output = generator.generate(**_drop_idle_guidance(settings), return_latents=return_latents)
        return _stack_audio(output.audio) if output.latents is None else output.latents

    def _limit_duration(self, duration: float | Sequence[float]) -> float | list[float]:
        """What the model can generate of a duration: the released project goes no further."""
        longest = self.generator.facts.longest
        given = _to_plain(duration)
        values = [check_number("duration", value) for value in (given if is_list(given) else [given])]
        if max(values, default=0) > longest:
            _logger.warning("duration=%s is limited to the %.1f s of %s.", given, longest, self.generator.facts.name)
        limited = [min(value, longest) for value in values]
        return limited if is_list(given) else limited[0]


class AutoencoderModel:
    """Encodes audio and decodes latents, with the calls of the released project's class of this name.

    Args:
        autoencoder: The autoencoder.
    """

    def __init__(self, autoencoder: Autoencoder) -> None:
        self.autoencoder = autoencoder
        self.sample_rate = autoencoder.sample_rate
        self.device = autoencoder.device

    @classmethod
    def from_pretrained(
        cls, model_name: str | os.PathLike[str], device: str | torch.device | None = None
    ) -> "AutoencoderModel":
        """Load an autoencoder in fp32.

        Args:
            model_name: Name such as "same-l", a whole model's name, or a folder.
            device: Such as "cuda"; None for the best that works.

        Returns:
            The model.
        """
        return cls(load_autoencoder(model_name, choose_device(device)))

    @torch.inference_mode()
    def encode(
        self,
        audio: Any,
        sr: int | Sequence[int],
        chunked: bool = False,
        chunk_size: int = CHUNK_SIZE,
        overlap: int = OVERLAP,
    ) -> Tensor:
        """Encode audio to latents; clips of a batch are padded with silence to the longest.

        Args:
            audio: Waveform (N,), (C, N) or (1, C, N), a list of them, or a batch (B, C, N). Mono is duplicated.
            sr: Sample rate in Hz, or a list of them.
            chunked: Whether to encode in overlapping chunks.
            chunk_size: Latent frames of a chunk.
            overlap: Frames shared with the next chunk.

        Returns:
            Latents (B, C, T).

        Raises:
            AudioError: When the audio is unusable.
            GenerationError: When there is not one sample rate per waveform.
        """
        is_batch = isinstance(audio, list | tuple) or getattr(audio, "ndim", 1) == 3
        clips, given = list(audio) if is_batch else [audio], _to_plain(sr)
        rates = [check_number("sr", rate) for rate in (given if is_list(given) else [given] * len(clips))]
        if len(rates) != len(clips) or not clips:
            raise GenerationError(
                f"sr has {len(rates)} sample rates for {len(clips)} waveforms. Give one, or one each."
            )
        stereo = []
        for clip, rate in zip(clips, rates, strict=True):
            clip_CN = _read_array(clip, "audio")
            check_audio(clip_CN, int(rate))
            stereo.append(resample(mix_channels(clip_CN), int(rate), self.sample_rate, RELEASED))
        audio_BCN = move_to_device(_stack_audio(stereo), self.device)
        return self.autoencoder.encode(audio_BCN, chunked=chunked, chunk_size=chunk_size, overlap=overlap)

    @torch.inference_mode()
    def decode(
        self, latents: Tensor, chunked: bool = False, chunk_size: int = CHUNK_SIZE, overlap: int = OVERLAP
    ) -> Tensor:
        """Decode latents to audio.

        Args:
            latents: Latents (B, C, T).
            chunked: Whether to decode in overlapping chunks.
            chunk_size: Latent frames of a chunk.
            overlap: Frames shared with the next chunk.

        Returns:
            Audio (B, 2, N).
        """
        latents_BCT = latents.to(self.device)
        return self.autoencoder.decode(latents_BCT, chunked=chunked, chunk_size=chunk_size, overlap=overlap)


def _check_sampling(sampling: dict[str, Any]) -> None:
    offered = ("sampler_type", *(name for name in GUIDANCE_SETTINGS if name != "negative_prompt"))
    if others := sorted(set(sampling) - set(offered)):
        raise GenerationError(
            f"{', '.join(others)}: not offered here. Set prompt, duration and inpaint_mask_start_seconds instead of "
            f"conditioning, sample_size and masks; sampling has {', '.join(offered)}."
        )


def _check_padding(seconds: Any) -> float:
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds <= 60:
        raise GenerationError(f"duration_padding_sec={seconds!r} must be from 0 to 60 seconds.")
    return float(seconds)


def _to_plain(value: Any) -> Any:
    """Numbers and texts as Python's own, where they come from NumPy or torch."""
    return value.tolist() if isinstance(value, Tensor | np.ndarray | np.generic) else value


def _fill_prompts(prompt: Any) -> Any:
    """The prompts, with empty text for None."""
    return [text or "" for text in prompt] if is_list(prompt) else prompt or ""


def _stack_audio(audio: list[Tensor]) -> Tensor:
    """One tensor (B, 2, N) of items (2, N_i), padded with silence."""
    longest = max(audio_CN.shape[-1] for audio_CN in audio)
    return torch.stack([fit(audio_CN, longest) for audio_CN in audio])


def _drop_idle_guidance(settings: dict[str, Any]) -> dict[str, Any]:
    idle = [name for name in GUIDANCE_SETTINGS if settings.get(name, get_default(name)) != get_default(name)]
    if settings["cfg_scale"] != 1 or not idle:
        return settings
    _logger.warning("%s: no effect with cfg_scale=1. Set cfg_scale > 1 (for example 7).", ", ".join(idle))
    return {name: value for name, value in settings.items() if name not in idle}


def _prepare_audio(init_audio: Any, init_noise_level: float) -> dict[str, Any]:
    if init_audio is not None:
        return {"init_audio": _read_pair(init_audio, "init_audio"), "init_noise_level": init_noise_level}
    if init_noise_level != 1.0:
        _logger.warning("init_noise_level=%s has no effect without init_audio.", init_noise_level)
    return {}


def _prepare_regions(audio: Any, starts: Any, ends: Any, duration: float | list[float]) -> dict[str, Any]:
    """Regions cut to the duration, as the released project does; nothing where they would have no effect."""
    missing = [value is None for value in (audio, starts, ends)]
    if any(missing):
        if not all(missing):
            _logger.warning(
                "inpaint_audio, inpaint_mask_start_seconds and inpaint_mask_end_seconds have an effect together only."
            )
        return {}
    shortest = min(duration) if isinstance(duration, list) else duration
    starts, ends = (list(times) if is_list(times) else [times] for times in map(_to_plain, (starts, ends)))
    ends = [check_number("inpaint_mask_end_seconds", end) for end in ends]
    if any(end > shortest for end in ends):
        _logger.warning("the region to regenerate is cut to the duration of %g s.", shortest)
    return {
        "inpaint_audio": _read_pair(audio, "inpaint_audio"),
        "inpaint_mask_start_seconds": starts,
        "inpaint_mask_end_seconds": [min(end, shortest) for end in ends],
    }


def _read_pair(value: Any, role: str) -> Any:
    """Audio for `Generator.generate`, whose arrays are (C, N) within ±1."""
    if not isinstance(value, list | tuple):
        return value
    return tuple(_read_array(item, role) if isinstance(item, Tensor | np.ndarray) else item for item in value)


def _read_array(value: Any, role: str) -> Tensor:
    """A float32 tensor: whole numbers scaled by their range, NumPy's (samples, channels) turned."""
    if not isinstance(value, Tensor | np.ndarray):
        raise GenerationError(f"{role} must be a tensor or an array, not {type(value).__name__}.")
    audio = torch.as_tensor(value)
    if audio.dtype in (torch.int8, torch.int16, torch.int32, torch.int64):
        audio = audio.double() / torch.iinfo(audio.dtype).max
    elif not audio.is_floating_point():
        raise GenerationError(f"{role} has the type {audio.dtype}. Give signed integers, or floats within ±1.")
    if isinstance(value, np.ndarray) and value.ndim == 2 and value.shape[0] > value.shape[1]:
        audio = audio.T
    if audio.ndim == 3 and len(audio) == 1:
        audio = audio[0]
    return audio.float().cpu().reshape(1, -1) if audio.ndim == 1 else audio.float().cpu()
