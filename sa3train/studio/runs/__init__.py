"""The Runs page of the studio: start, watch, stop and resume training runs."""
