"""Adapter files in and out: native safetensors, PEFT folders, ComfyUI."""
