"""Command-line entry points; the only readers of Hydra configs and command-line flags."""
