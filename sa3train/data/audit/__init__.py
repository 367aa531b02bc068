"""Check audio and captions before encoding, and report findings."""
