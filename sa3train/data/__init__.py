"""From audio files to training batches: sources, audit, encoding, shards, loading."""
