"""Adapters on a loaded model: stacks, effective weights and load reports."""
