"""Train adapters with Lightning: module, objective step, callbacks, checkpoints, loggers."""
