"""From a checked request to denoised latents; `finishing` makes audio of them.

Random draws, all from one CPU generator, in this order: starting noise, encoder noise, the sampler, the decoder.
Shapes: B items, C latent channels, T latent frames, N samples.

From latents to audio: decoded, cut and clamped; and what the user should know about it.

Shapes: B items, C latent channels (or audio channels), T latent frames, N samples.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from sa3train.adapters.apply.stack import AdapterStack
from sa3train.audio.edit import clamp_counted, fit
from sa3train.core.device import normal, to_device, to_host
from sa3train.core.errors import RequestError
from sa3train.core.log import progress
from sa3train.diffusion.guidance import Condition, guided_velocity
from sa3train.diffusion.masks import padding_mask, regions_mask
from sa3train.diffusion.samplers import DRAWING, SAMPLERS, Callback
from sa3train.diffusion.schedule import sampling_schedule
from sa3train.inference.cuda_graphs import Recorded, Step
from sa3train.inference.input_audio import Source
from sa3train.inference.request import ModelFacts, Request, generated_frames, real_frames, samples_of
from sa3train.models.checkpoint import StableAudio3
from sa3train.models.dit import DiT


@dataclass(frozen=True, eq=False)
class Start:
    """Where sampling begins: latents (B, C, T) at noise level `sigma_max`; and what inpainting keeps of other audio."""

    latents_BCT: Tensor
    sigma_max: float
    kept_B1T: Tensor
    masked_BCT: Tensor


def starting_point(
    model: StableAudio3,
    facts: ModelFacts,
    request: Request,
    init: Source | None,
    inpaint: Source | None,
    generator: torch.Generator,
) -> Start:
    """Noise, or what is to be varied between it and the audio, as long as the longest item."""
    device = model.autoencoder.device
    frames = generated_frames(facts, max(request.duration))
    noise_BCT = normal((request.batch_size, model.latent_channels, frames), generator, device)
    start_BCT, sigma_max = noise_BCT, 1.0
    if init is not None and request.init_noise_level is not None:
        sigma_max = request.init_noise_level
        encoded_1CT = encode_source(model, facts, init, frames, device, generator)
        start_BCT = (encoded_1CT * (1 - sigma_max) + noise_BCT * sigma_max).contiguous()
    kept_B1T = torch.zeros(request.batch_size, 1, frames, device=device)
    masked_BCT = torch.zeros_like(noise_BCT)
    if inpaint is not None:
        encoded_1CT = encode_source(model, facts, inpaint, frames, device, generator)
        kept_B1T = to_device(inpainting_mask(facts, request, frames), device)
        masked_BCT = encoded_1CT * kept_B1T
    return Start(start_BCT, sigma_max, kept_B1T, masked_BCT)


def draws_to_come(model: StableAudio3, request: Request, start: Start) -> list[tuple[int, ...]]:
    """Shapes of what the sampler and the decoder will draw, in order."""
    steps = request.steps if request.sampler_type in DRAWING and start.sigma_max > 0 else 0
    batch, _, frames = start.latents_BCT.shape
    return [tuple(start.latents_BCT.shape)] * steps + model.autoencoder.draws(batch, frames, request.chunked_decode)


def sample_latents(
    model: StableAudio3,
    facts: ModelFacts,
    stack: AdapterStack,
    request: Request,
    start: Start,
    generator: torch.Generator,
    callback: Callback | None = None,
    cuda_graphs: bool = False,
) -> Tensor:
    """The denoised latents (B, C, T), float32 on the model's device. T follows the longest item.

    With `keep_exact` the frames that inpainting keeps are the source's own; else the model's copy of them, as released.
    `cuda_graphs` records the denoiser's step and replays it, see `graphs`.
    """
    latents_BCT = start.latents_BCT
    if start.sigma_max > 0.0:
        denoiser = Denoiser(model.dit, cuda_graphs)
        latents_BCT = _denoise(model, facts, stack, request, start, denoiser, generator, callback)
    return torch.where(start.kept_B1T.bool(), start.masked_BCT, latents_BCT) if request.keep_exact else latents_BCT


def _denoise(
    model: StableAudio3,
    facts: ModelFacts,
    stack: AdapterStack,
    request: Request,
    start: Start,
    denoiser: "Denoiser",
    generator: torch.Generator,
    callback: Callback | None,
) -> Tensor:
    local_BCT = torch.cat((start.kept_B1T, start.masked_BCT), dim=1)
    # The conditions are made once, with every adapter on whatever its interval of noise levels.
    stack.apply(None)
    condition = _condition(model, facts, request, local_BCT)

    def velocity(x_BCT: Tensor, t: Tensor) -> Tensor:
        if stack.apply(float(t)):
            denoiser.forget()
        t_B = t.float().expand(request.batch_size)
        return guided_velocity(denoiser, x_BCT, t_B, condition, request.guidance)

    sigmas = sampling_schedule(request.steps, start.sigma_max)
    sampler = SAMPLERS[request.sampler_type]
    bar = _with_bar(request.steps, callback)
    return sampler(velocity, start.latents_BCT, sigmas, generator=generator, callback=bar)


class Denoiser:
    """The DiT within one generation: what depends on the conditions alone is worked out once, not at every step.

    The conditions never change there, so the number of rows (B, or 2B under guidance) says which they are.
    """

    def __init__(self, dit: DiT, cuda_graphs: bool = False) -> None:
        self.dit, self.cuda_graphs = dit, cuda_graphs
        self._steps: dict[int, Step] = {}

    def forget(self) -> None:
        """Work everything out anew: a weight has changed."""
        self._steps.clear()

    def __call__(
        self,
        x_BCT: Tensor,
        t_B: Tensor,
        *,
        cross_attn_cond_BLD: Tensor,
        global_cond_BD: Tensor,
        local_add_cond_BCT: Tensor | None = None,
        padding_mask_BT: Tensor | None = None,
    ) -> Tensor:
        rows = len(x_BCT)
        if rows not in self._steps:
            prepared = self.dit.prepare(
                x_BCT.shape,
                cross_attn_cond_BLD=cross_attn_cond_BLD,
                global_cond_BD=global_cond_BD,
                local_add_cond_BCT=local_add_cond_BCT,
                padding_mask_BT=padding_mask_BT,
            )
            step: Step = functools.partial(self.dit.velocity, prepared=prepared)
            self._steps[rows] = Recorded(step) if self.cuda_graphs else step
        return self._steps[rows](x_BCT, t_B)


def encode_source(
    model: StableAudio3,
    facts: ModelFacts,
    source: Source,
    frames: int,
    device: torch.device,
    generator: torch.Generator,
) -> Tensor:
    """Latents (1, C, T) of audio padded with silence, or cut, to the length that is generated."""
    audio_1CN = to_device(fit(source.audio_CN, frames * facts.downsampling_ratio)[None], device)
    return model.autoencoder.encode(audio_1CN, generator=generator)[..., :frames].float()


def inpainting_mask(facts: ModelFacts, request: Request, frames: int) -> Tensor:
    """1 where a frame is kept: (B, 1, T)."""
    samples = frames * facts.downsampling_ratio
    rows = [regions_mask(request.regions, each, facts.sample_rate, samples, frames) for each in request.duration]
    return torch.stack(rows)[:, None]


def real_mask(facts: ModelFacts, request: Request, frames: int) -> Tensor:
    """True where a frame is not padding: (B, T)."""
    return padding_mask(torch.tensor([real_frames(facts, each, frames) for each in request.duration]), frames)


def _condition(model: StableAudio3, facts: ModelFacts, request: Request, local_BCT: Tensor) -> Condition:
    cond = model.conditioner(list(request.prompt), list(request.duration))
    negative_BLD = negative_mask_BL = None
    if request.negative_prompt is not None:
        negative = model.conditioner(list(request.negative_prompt), list(request.duration))
        negative_BLD = negative.cross_attn_cond_BLD
        seconds_token = negative.prompt_mask_BL.new_ones(request.batch_size, 1)
        negative_mask_BL = torch.cat((negative.prompt_mask_BL, seconds_token), dim=1)
    return Condition(
        cross_attn_cond_BLD=cond.cross_attn_cond_BLD,
        global_cond_BD=cond.global_cond_BD,
        local_add_cond_BCT=local_BCT,
        padding_mask_BT=to_device(real_mask(facts, request, local_BCT.shape[-1]), local_BCT.device),
        negative_cross_attn_cond_BLD=negative_BLD,
        negative_mask_BL=negative_mask_BL,
    )


def _with_bar(steps: int, callback: Callback | None) -> Callback:
    ticks = progress(range(steps), "sampling", total=steps, unit="step")

    def report(step: int, total: int, sigma: float, denoised_BCT: Tensor) -> None:
        if callback is not None:
            callback(step, total, sigma, denoised_BCT)
        next(ticks)
        if step == total - 1:
            next(ticks, None)  # the bar fills up and closes

    return report


def decode_audio(
    model: StableAudio3, facts: ModelFacts, request: Request, latents_BCT: Tensor, generator: torch.Generator
) -> tuple[list[Tensor], list[float]]:
    """Each item's audio (2, N_i) within ±1, on the CPU, and the share of its samples that were louder.

    Raises `RequestError` when the model made NaN or infinity.
    """
    frames = latents_BCT.shape[-1]
    decoded_BCN = model.autoencoder.decode(latents_BCT, generator=generator, chunked=request.chunked_decode)
    decoded_BCN = decoded_BCN[..., : frames * facts.downsampling_ratio].float()
    real_BT = to_device(real_mask(facts, request, frames), decoded_BCN.device)
    real_BN = real_BT.repeat_interleave(facts.downsampling_ratio, dim=1)
    decoded_BCN = torch.where(real_BN[:, None, :], decoded_BCN, 0.0)
    items = [decoded_BCN[index, :, : samples_of(facts, each)] for index, each in enumerate(request.duration)]
    clamped = [clamp_counted(item_CN) for item_CN in items]
    shares_B = torch.stack([share for _, share in clamped])
    *audio, finite_B, shares_B = to_host([*(audio_CN for audio_CN, _ in clamped), all_finite(items), shares_B])
    if not bool(finite_B.all()):
        raise RequestError(
            "the model made NaN or infinity. Try precision fp32 or bf16, a lower cfg_scale, or a lower strength."
        )
    return audio, shares_B.tolist()


def all_finite(items: list[Tensor]) -> Tensor:
    """Whether each item is free of NaN and infinity: (B,), on its device."""
    return torch.stack([torch.isfinite(item_CN).all() for item_CN in items])


def warnings_of(
    facts: ModelFacts, request: Request, init: Source | None, inpaint: Source | None, shares: list[float]
) -> list[str]:
    """What a user should know about a finished generation."""
    warnings = []
    if init is not None and request.init_noise_level == 1.0:
        warnings.append(
            "init_audio had no effect: at init_noise_level 1 it is all noise. Try a level below 1, such as 0.9."
        )
    for role, source in (("init_audio", init), ("inpaint_audio", inpaint)):
        warnings += [] if source is None else _length_warnings(facts, request, role, source)
    for index, share in enumerate(shares):
        if share > 0:
            which = f"item {index}" if len(shares) > 1 else "the audio"
            warnings.append(
                f"{which} was louder than full scale in {share:.2%} of its samples, which were clipped to it."
            )
    return warnings


def truncated_prompts(model: StableAudio3, request: Request) -> list[str]:
    """A warning for each prompt longer than the model reads."""
    prompts = dict.fromkeys([*request.prompt, *(request.negative_prompt or ())])
    most = model.conditioner.max_length
    counts = zip(prompts, model.conditioner.token_counts(list(prompts)), strict=True)
    return [
        f"the prompt {prompt[:40]!r}… has {count} tokens, and the model read the first {most} only."
        for prompt, count in counts
        if count > most
    ]


def _length_warnings(facts: ModelFacts, request: Request, role: str, source: Source) -> list[str]:
    have, longest = source.audio_CN.shape[1] / facts.sample_rate, max(request.duration)
    if have > longest + 1 / facts.sample_rate:
        return [f"{role} is {have:.2f} s long and was cut to the duration of {longest:g} s."]
    untouched = [have]
    for start, end in sorted(request.regions):
        if start <= untouched[0] + facts.downsampling_ratio / facts.sample_rate:
            untouched[0] = max(untouched[0], end)
    if role == "inpaint_audio" and untouched[0] + facts.downsampling_ratio / facts.sample_rate < longest:
        return [
            f"inpaint_audio is {have:.2f} s long: from {untouched[0]:.2f} to {longest:g} s silence is kept. "
            f"To continue the audio, let a region start at its end and reach {longest:g} s."
        ]
    return []
