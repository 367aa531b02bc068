"""Encode clips into latent shards, restartable and in several processes."""
