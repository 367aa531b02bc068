"""The Adapters page: inspect, convert and merge adapter files."""
