"""One clip from start to audio: what a generation, each pass of a loop and each window of a piece have in common."""

from torch import Tensor

from sa3train.adapters.apply.stack import AdapterStack
from sa3train.audio.edit import blend_region, fit
from sa3train.core.noise import prefetch_noise
from sa3train.diffusion.samplers import Callback
from sa3train.inference.decoding import decode_audio
from sa3train.inference.sampling import Generation, list_noise_shapes, prepare_start, sample_latents


def generate_clip(
    generation: Generation, stack: AdapterStack, callback: Callback | None = None, cuda_graphs: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """Generate a batch at once.

    Args:
        generation: The generation.
        stack: The adapters on the model.
        callback: Called after each step; may raise to cancel.
        cuda_graphs: Whether to capture the denoiser's step.

    Returns:
        Latents (B, C, T), and the audio (2, N_i) of each item, which may exceed ±1.
    """
    start = prepare_start(generation)
    with prefetch_noise(generation.rng, list_noise_shapes(generation, start), generation.model.autoencoder.device):
        latents_BCT = sample_latents(generation, stack, start, callback, cuda_graphs)
        audio = decode_audio(generation, latents_BCT)
    return latents_BCT, _restore_source(generation, audio) if generation.settings.keep_exact else audio


def _restore_source(generation: Generation, audio: list[Tensor]) -> list[Tensor]:
    """Put the samples of `inpaint_audio` back around the regions, which are faded into them.

    Regenerated frames begin and end up to a frame later than the regions. Where the source ends before a region, as in
    a continuation, what is behind it is the model's.
    """
    source_CN, rate = generation.inputs["inpaint_audio"].audio_CN, generation.facts.sample_rate
    restored = []
    for item_CN in audio:
        result_CN = fit(source_CN, item_CN.shape[1])
        for start_seconds, end_seconds in generation.settings.regions:
            start = min(int(start_seconds * rate), source_CN.shape[1])
            stop = min(int(end_seconds * rate), item_CN.shape[1])
            if start < stop:
                result_CN = blend_region(result_CN, item_CN, start, stop)
        restored.append(result_CN)
    return restored
