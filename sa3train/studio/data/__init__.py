"""The Data page: audit, caption and encode audio, preview prompts."""
