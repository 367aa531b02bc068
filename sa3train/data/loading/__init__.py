"""From latent shards to training batches: sampling, prompts, batching."""
