"""Training of adapters on the autoencoder's decoder: the encoder is frozen, and clips are their own targets."""
