"""The SA3 models: diffusion transformer, SAME autoencoder, conditioners, and loading their checkpoints."""
