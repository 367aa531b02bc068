"""The Play page: generate with adapters and compare results."""
