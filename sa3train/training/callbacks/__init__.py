"""Lightning callbacks of a training run: checkpoints, validation, demos, metrics, memory plan, report."""
