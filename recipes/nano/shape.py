"""The architecture that these recipes train: nano's, with the latent width of `targets.py` and a trained tokenizer."""

from __future__ import annotations

from typing import Any

from targets import LATENT

from sa3train.models.autoencoder import Autoencoder
from sa3train.models.config import AutoencoderConfig, StackConfig
from sa3train.models.nano import nano_config

MAX_TOKENS = 64
MASK_NOISE = 0.003  # of the decoder's new tokens: what hiss is made of


def config(objective: str) -> dict[str, Any]:
    """`nano_config` with latents of width `LATENT` and prompts of `MAX_TOKENS` pieces."""
    made = nano_config(objective)
    model = made["model"]
    model["io_channels"] = model["diffusion"]["config"]["io_channels"] = LATENT
    model["diffusion"]["config"]["local_add_cond_dim"] = LATENT + 1
    model["conditioning"]["configs"][0]["config"]["max_length"] = MAX_TOKENS
    autoencoder = model["pretransform"]["config"]
    autoencoder["latent_dim"] = autoencoder["bottleneck"]["config"]["dim"] = LATENT
    for side in ("encoder", "decoder"):
        autoencoder[side]["config"]["latent_dim"] = LATENT
    return made


def autoencoder() -> Autoencoder:
    """The untrained autoencoder of that architecture."""
    encoder = StackConfig(width=256, depth=2, latent_width=LATENT, chunk_size=32)
    decoder = StackConfig(
        width=256, depth=3, latent_width=LATENT, chunk_size=32, mask_noise=MASK_NOISE, conv_mapping=True
    )
    return Autoencoder(AutoencoderConfig(encoder, decoder, latent_width=LATENT))
