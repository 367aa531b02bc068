"""Adapters of the LoRA family: read, apply to a model, train, convert and edit."""
