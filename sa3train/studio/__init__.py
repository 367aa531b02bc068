"""The studio: a local page to play adapters, watch runs and handle data. Started by `sa3-studio`."""
