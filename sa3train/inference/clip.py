"""One clip from start to audio: what a generation, each pass of a loop and each window of a piece have in common."""

from torch import Tensor

from sa3train.adapters.apply.stack import AdapterStack
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
        return latents_BCT, decode_audio(generation, latents_BCT)
