"""From latents to audio: decoded, cut and clamped; and what the user should know about it.

Shapes: B items, C latent channels (or audio channels), T latent frames, N samples.
"""

import torch
from torch import Tensor

from sa3train.audio.edit import clamp_counted
from sa3train.errors import RequestError
from sa3train.inference.generation import real_mask
from sa3train.inference.request import ModelFacts, Request, samples_of
from sa3train.inference.sources import Source
from sa3train.models.checkpoint import StableAudio3
from sa3train.transfer import to_device, to_host


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
