"""From latents to audio: decode and cut, and collect what the user should know about the result.

Shapes: B items, C latent channels (or audio channels), T latent frames, N samples.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from sa3train.audio.metrics import is_silent
from sa3train.core.device import move_to_device, move_to_host
from sa3train.core.errors import GenerationError
from sa3train.core.text import format_share, shorten
from sa3train.inference.prompt_weights import find_nested_weight, find_unread_weight, parse_prompt_weights
from sa3train.inference.resolve import count_samples
from sa3train.inference.sampling import Generation, build_item_mask


def decode_audio(generation: Generation, latents_BCT: Tensor) -> list[Tensor]:
    """Decode latents to audio, which may exceed ±1.

    Args:
        generation: The generation.
        latents_BCT: Denoised latents.

    Returns:
        The audio (2, N_i) of each item on the CPU.

    Raises:
        GenerationError: When the model's output is NaN or infinite.
    """
    facts, settings, frames = generation.facts, generation.settings, latents_BCT.shape[-1]
    autoencoder = generation.model.autoencoder
    decoded_BCN = autoencoder.decode(latents_BCT, generator=generation.rng, chunked=settings.chunked_decode)
    decoded_BCN = decoded_BCN[..., : frames * facts.downsampling_ratio].float()
    real_BT = move_to_device(build_item_mask(generation, frames), decoded_BCN.device)
    real_BN = real_BT.repeat_interleave(facts.downsampling_ratio, dim=1)
    decoded_BCN = torch.where(real_BN[:, None, :], decoded_BCN, 0.0)
    lengths = [None if facts.keeps_tail else count_samples(facts, each) for each in settings.duration]
    items = [decoded_BCN[index, :, :length] for index, length in enumerate(lengths)]
    *audio, finite_B = move_to_host([*items, _are_finite(items)])
    if not bool(finite_B.all()):
        raise GenerationError(
            "the model produced NaN or infinity. Try precision fp32 or bf16, a lower cfg_scale, or a lower strength."
        )
    return audio


def _are_finite(items: list[Tensor]) -> Tensor:
    """Whether each item is free of NaN and infinity: (B,), on its device."""
    return torch.stack([torch.isfinite(item_CN).all() for item_CN in items])


def collect_warnings(generation: Generation, clipped_shares: list[float]) -> list[str]:
    """Collect what the user should know about a finished generation.

    Args:
        generation: The generation.
        clipped_shares: Share of clipped samples of each item.

    Returns:
        Warnings about prompts and audio that were cut, input without effect, and clipping.
    """
    warnings = _warn_of_prompts(generation)
    if generation.settings.init_noise_level == 1.0:
        warnings.append("init_audio had no effect: init_noise_level=1 replaces it by noise. Try 0.9.")
    if generation.settings.init_noise_level == 0.0:
        warnings.append("prompt and sampling settings had no effect: init_noise_level=0 keeps init_audio. Try 0.5.")
    for role in generation.inputs:
        warnings += _warn_of_input(generation, role)
    for index, share in enumerate(clipped_shares):
        if share > 0:
            which = f"item {index}" if len(clipped_shares) > 1 else "the audio"
            warnings.append(f"{which} exceeded full scale in {format_share(share)} of its samples, which were clipped.")
    return warnings


def _warn_of_prompts(generation: Generation) -> list[str]:
    conditioner, settings = generation.model.conditioner, generation.settings
    later = [str(text) for _, text in settings.prompt_at or ()]
    given = dict.fromkeys([*settings.prompt, *later, *(settings.negative_prompt or ())])
    lost = [
        f"only the inner weight of {found} counts, the outer one is text. Give each phrase its own."
        for found in map(find_nested_weight, given)
        if found
    ]
    lost += [
        f"{shorten(found, 40)} is text, not a weight. Write (phrase:1.3), the number right before the parenthesis."
        for found in map(find_unread_weight, given)
        if found
    ]
    prompts = [parse_prompt_weights(prompt)[0] for prompt in given]
    counts = zip(prompts, conditioner.count_tokens(prompts), strict=True)
    return lost + [
        f"the prompt {prompt[:40]!r}… has {count} tokens and was truncated to {conditioner.max_length}."
        for prompt, count in counts
        if count > conditioner.max_length
    ]


def _warn_of_input(generation: Generation, role: str) -> list[str]:
    if is_silent(generation.inputs[role].audio_CN):
        return [f"{role} is silent: there is nothing in it to keep."]
    facts, settings = generation.facts, generation.settings
    frame = facts.downsampling_ratio / facts.sample_rate
    length, longest = generation.inputs[role].audio_CN.shape[1] / facts.sample_rate, max(settings.duration)
    if role == "inpaint_audio" and _cover(settings.regions, 0.0, 0.0) >= longest:
        return ["inpaint_audio had no effect: the regions to regenerate leave nothing of it."]
    if length > longest + 1 / facts.sample_rate:
        return [f"{role} is {length:.2f} s long and was truncated to the duration of {longest:g} s."]
    if role == "init_audio" and length + frame < longest:
        return [
            f"init_audio is {length:.2f} s long: what follows, to {longest:g} s, starts from silence and stays quiet. "
            f"Set the duration to {length:.2f}, or continue the audio by inpainting from its end."
        ]
    covered = _cover(settings.regions, length, frame)
    if role == "inpaint_audio" and covered + frame < longest:
        return [
            f"inpaint_audio is {length:.2f} s long: from {covered:.2f} to {longest:g} s the result is silence. To "
            f"continue the audio, let a region start at its end and reach {longest:g} s."
        ]
    return []


def _cover(regions: Iterable[tuple[float, float]], covered: float, gap: float) -> float:
    """The end of what is covered up to a time, once regions are added to it that begin at most `gap` after its end."""
    for start, end in sorted(regions):
        if start <= covered + gap:
            covered = max(covered, end)
    return covered
