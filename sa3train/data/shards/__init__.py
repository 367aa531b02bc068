"""Write, index and read latent shards (tar files with an index)."""
