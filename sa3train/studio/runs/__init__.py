"""The Runs page: start, watch, stop and resume training runs."""
