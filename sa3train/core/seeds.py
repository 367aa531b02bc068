"""Seeds derived from names and numbers, so that each draw has its own and none depends on another."""

import hashlib


def derive_seed(*parts: object) -> int:
    """Derive a seed from any parts, the same on every machine.

    Args:
        *parts: Texts and numbers.

    Returns:
        A 63-bit seed.
    """
    text = "\x1f".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1
