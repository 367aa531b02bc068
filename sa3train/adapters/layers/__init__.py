"""Adapters in training: PEFT layers with exact norms and their gradients."""
