"""Run folders read back: metrics, curves, audio and the HTML report of a training run."""
