"""LoRA fine-tuning for Stable Audio 3. Importing this package loads nothing heavy: import from its rooms."""

__version__ = "0.1.0"
