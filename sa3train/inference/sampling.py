"""From resolved settings to denoised latents.

All random draws come from one CPU generator in this order: starting noise, encoder noise, the sampler, the decoder.

Shapes: B items, C latent channels, T latent frames, N samples; t = 1 is noise, t = 0 is data.
"""

import functools
from dataclasses import dataclass
from typing import Unpack

import torch
from torch import Tensor

from sa3train.adapters.apply.stack import AdapterStack
from sa3train.audio.edit import fit
from sa3train.core.device import move_to_device
from sa3train.core.log import track_progress
from sa3train.core.noise import randn
from sa3train.diffusion.guidance import Condition, Guidance, VelocityInputs, compute_guided_velocity
from sa3train.diffusion.masks import build_attention_mask, build_region_mask
from sa3train.diffusion.samplers import SAMPLERS, Callback
from sa3train.diffusion.schedule import build_schedule
from sa3train.inference.cuda_graphs import CUDAGraphRunner, Step
from sa3train.inference.input_audio import InputAudio
from sa3train.inference.prompt_weights import encode_prompts
from sa3train.inference.resolve import ModelFacts, ResolvedSettings, count_generated_frames, count_real_frames
from sa3train.models.checkpoint import StableAudio3
from sa3train.models.dit import DiT


@dataclass(frozen=True, eq=False)
class Generation:
    """One generation: what every step of it needs.

    Attributes:
        model: The model.
        facts: The model's sizes.
        settings: What to generate.
        inputs: `init_audio` and `inpaint_audio`, where there is any.
        rng: CPU generator of all random draws.
    """

    model: StableAudio3
    facts: ModelFacts
    settings: ResolvedSettings
    inputs: dict[str, InputAudio]
    rng: torch.Generator


@dataclass(frozen=True, eq=False)
class SamplingStart:
    """Where sampling begins.

    Attributes:
        latents_BCT: Noise, or its mix with `init_audio`.
        sigma_max: Their noise level.
        kept_B1T: 1 where inpainting keeps a frame.
        masked_BCT: Latents of `inpaint_audio`, 0 where they are regenerated.
        held_BCT: Latents on whose straight path from noise a frame stays, down to its level of `held_B1T`.
        held_B1T: That level: 0 holds a frame to the end (with `keep_exact` whatever the sampler), 1 never. None holds
            none, as released.
    """

    latents_BCT: Tensor
    sigma_max: float
    kept_B1T: Tensor
    masked_BCT: Tensor
    held_BCT: Tensor | None = None
    held_B1T: Tensor | None = None


def prepare_start(generation: Generation) -> SamplingStart:
    """Draw the starting noise and encode the input audio, to the length of the longest item.

    Args:
        generation: The generation.

    Returns:
        Where sampling begins.
    """
    model, facts, settings = generation.model, generation.facts, generation.settings
    device = model.autoencoder.device
    frames = count_generated_frames(facts, max(settings.duration), settings.tail)
    noise_BCT = randn((settings.batch_size, model.latent_channels, frames), generation.rng, device)
    start_BCT, sigma_max = noise_BCT, 1.0
    if settings.init_noise_level is not None:
        sigma_max = settings.init_noise_level
        encoded_1CT = _encode_input(generation, "init_audio", frames)
        start_BCT = (encoded_1CT * (1 - sigma_max) + noise_BCT * sigma_max).contiguous()
    kept_B1T = torch.zeros(settings.batch_size, 1, frames, device=device)
    masked_BCT = torch.zeros_like(noise_BCT)
    if "inpaint_audio" in generation.inputs:
        encoded_1CT = _encode_input(generation, "inpaint_audio", frames)
        kept_B1T = move_to_device(_build_inpainting_mask(generation, frames), device)
        masked_BCT = encoded_1CT * kept_B1T
    return SamplingStart(start_BCT, sigma_max, kept_B1T, masked_BCT)


def _encode_input(generation: Generation, role: str, frames: int) -> Tensor:
    """Latents (1, C, T) of audio padded with silence, or cut, to the length that is generated."""
    autoencoder, source = generation.model.autoencoder, generation.inputs[role]
    audio_1CN = fit(source.audio_CN, frames * generation.facts.downsampling_ratio)[None]
    audio_1CN = move_to_device(audio_1CN, autoencoder.device)
    return autoencoder.encode(audio_1CN, generator=generation.rng)[..., :frames].float()


def _build_inpainting_mask(generation: Generation, frames: int) -> Tensor:
    """1 where a frame is kept: (B, 1, T)."""
    facts, settings = generation.facts, generation.settings
    samples = frames * facts.downsampling_ratio
    rows = [build_region_mask(settings.regions, each, facts.sample_rate, samples, frames) for each in settings.duration]
    return torch.stack(rows)[:, None]


def build_item_mask(generation: Generation, frames: int) -> Tensor:
    """Build the mask of frames that are not padding.

    Args:
        generation: The generation.
        frames: Latent frames of the batch.

    Returns:
        Mask (B, T) on the CPU, True where a frame belongs to its item.
    """
    facts, tail = generation.facts, generation.settings.tail
    lengths = [count_real_frames(facts, each, frames, tail) for each in generation.settings.duration]
    return build_attention_mask(torch.tensor(lengths), frames)


def list_noise_shapes(generation: Generation, start: SamplingStart) -> list[tuple[int, ...]]:
    """List the shapes of the noise that the sampler and the decoder will draw.

    Args:
        generation: The generation.
        start: Where sampling begins.

    Returns:
        Shapes in the order of the draws.
    """
    settings = generation.settings
    steps = settings.steps if SAMPLERS[settings.sampler_type].is_stochastic and start.sigma_max > 0 else 0
    batch, _, frames = start.latents_BCT.shape
    of_decoder = generation.model.autoencoder.list_noise_shapes(batch, frames, settings.chunked_decode)
    return [tuple(start.latents_BCT.shape)] * steps + of_decoder


def list_noise_levels(settings: ResolvedSettings) -> list[float]:
    """List the noise levels at which the model is evaluated.

    Args:
        settings: What to generate.

    Returns:
        The levels in order, those within a step included.
    """
    levels: list[float] = []
    sigma_max = 1.0 if settings.init_noise_level is None else settings.init_noise_level

    def record(x_BCT: Tensor, t: Tensor) -> Tensor:
        levels.append(float(t))
        return torch.zeros_like(x_BCT)

    if sigma_max > 0.0:
        sample, nothing = SAMPLERS[settings.sampler_type].sample, torch.zeros(1, 1, 1)
        sample(record, nothing, build_schedule(settings.steps, sigma_max), generator=torch.Generator(), callback=None)
    return levels


def build_guidance(settings: ResolvedSettings) -> Guidance:
    """Build the guidance of a generation.

    Args:
        settings: What to generate.

    Returns:
        The guidance.
    """
    return Guidance(
        settings.cfg_scale, settings.cfg_interval, settings.apg_scale, settings.cfg_norm_threshold, settings.scale_phi
    )


def sample_latents(
    generation: Generation,
    stack: AdapterStack,
    start: SamplingStart,
    callback: Callback | None = None,
    cuda_graphs: bool = False,
) -> Tensor:
    """Denoise from the start to latents.

    With `keep_exact` the frames outside the mask are those of `inpaint_audio`; else the model's copy, as released.

    Args:
        generation: The generation.
        stack: The adapters on the model.
        start: Where sampling begins.
        callback: Called after each step; may raise to cancel.
        cuda_graphs: Whether to capture the denoiser's step and replay it, see `CUDAGraphRunner`.

    Returns:
        Latents (B, C, T), float32 on the model's device; T follows the longest item.
    """
    latents_BCT = start.latents_BCT
    if start.sigma_max > 0.0:
        latents_BCT = _denoise(generation, stack, start, Denoiser(generation.model.dit, cuda_graphs), callback)
    if generation.settings.keep_exact:
        latents_BCT = torch.where(start.kept_B1T.bool(), start.masked_BCT, latents_BCT)
    return latents_BCT


def _denoise(
    generation: Generation, stack: AdapterStack, start: SamplingStart, denoiser: "Denoiser", callback: Callback | None
) -> Tensor:
    settings = generation.settings
    local_BCT = torch.cat((start.kept_B1T, start.masked_BCT), dim=1)
    # The conditions are computed once, with every adapter on whatever its interval of noise levels.
    stack.apply(None)
    condition = _encode_condition(generation, local_BCT)
    guidance = build_guidance(settings)

    def velocity(x_BCT: Tensor, t: Tensor) -> Tensor:
        if stack.apply(float(t)):
            denoiser.reset()
        t_B = t.float().expand(settings.batch_size)
        v_BCT = compute_guided_velocity(denoiser, x_BCT, t_B, condition, guidance)
        if start.held_BCT is None or start.held_B1T is None:
            return v_BCT
        return torch.where(start.held_B1T < t, (x_BCT - start.held_BCT) / t, v_BCT)

    sigmas = build_schedule(settings.steps, start.sigma_max)
    sample = SAMPLERS[settings.sampler_type].sample
    bar = _add_progress_bar(settings.steps, callback)
    return sample(velocity, start.latents_BCT, sigmas, generator=generation.rng, callback=bar)


class Denoiser:
    """The DiT within one generation, where what depends on the conditions alone is computed once, not at every step.

    The conditions never change, so the number of rows (B, or 2B under guidance) identifies them.

    Args:
        dit: The model's denoiser.
        cuda_graphs: Whether to capture its step and replay it.
    """

    def __init__(self, dit: DiT, cuda_graphs: bool = False) -> None:
        self.dit, self.cuda_graphs = dit, cuda_graphs
        self._steps: dict[int, Step] = {}

    def reset(self) -> None:
        """Discard what was computed, after a change of weights."""
        self._steps.clear()

    def __call__(self, x_BCT: Tensor, t_B: Tensor, **inputs: Unpack[VelocityInputs]) -> Tensor:
        rows = len(x_BCT)
        if rows not in self._steps:
            prepared = self.dit.prepare(x_BCT.shape, **inputs)
            step: Step = functools.partial(self.dit.predict_velocity, prepared=prepared)
            self._steps[rows] = CUDAGraphRunner(step) if self.cuda_graphs else step
        return self._steps[rows](x_BCT, t_B)


def _encode_condition(generation: Generation, local_BCT: Tensor) -> Condition:
    conditioner, settings = generation.model.conditioner, generation.settings
    seconds_B = move_to_device(torch.tensor(settings.duration, dtype=torch.float32), conditioner.device)
    cond = conditioner.condition(encode_prompts(conditioner, settings.prompt), seconds_B)
    negative_BLD = negative_mask_BL = None
    if settings.negative_prompt is not None:
        negative = conditioner.condition(encode_prompts(conditioner, settings.negative_prompt), seconds_B)
        negative_BLD = negative.cross_attn_cond_BLD
        seconds_token = negative.prompt_mask_BL.new_ones(settings.batch_size, 1)
        negative_mask_BL = torch.cat((negative.prompt_mask_BL, seconds_token), dim=1)
    return Condition(
        cross_attn_cond_BLD=cond.cross_attn_cond_BLD,
        global_cond_BD=cond.global_cond_BD,
        local_add_cond_BCT=local_BCT,
        attention_mask_BT=move_to_device(build_item_mask(generation, local_BCT.shape[-1]), local_BCT.device),
        negative_cross_attn_cond_BLD=negative_BLD,
        negative_mask_BL=negative_mask_BL,
    )


def report_part(callback: Callback | None, part: int, parts: int) -> Callback | None:
    """Make the callback of one of several samplings, whose steps count as those of one.

    Args:
        callback: The callback of all; None for none.
        part: Index of the sampling.
        parts: How many there are.

    Returns:
        The callback of the part.
    """
    if callback is None:
        return None

    def report(step: int, total: int, sigma: float, denoised_BCT: Tensor) -> None:
        callback(part * total + step, parts * total, sigma, denoised_BCT)

    return report


def _add_progress_bar(steps: int, callback: Callback | None) -> Callback:
    ticks = track_progress(range(steps), "sampling", total=steps, unit="step")

    def report(step: int, total: int, sigma: float, denoised_BCT: Tensor) -> None:
        if callback is not None:
            callback(step, total, sigma, denoised_BCT)
        next(ticks)
        if step == total - 1:
            next(ticks, None)  # the bar fills up and closes

    return report
