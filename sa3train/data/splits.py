"""Train and held-out split by content, so that the same sound is never in both and a clip stays where it is."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sa3train.errors import ConfigError, DataError

TRAIN, HELDOUT = "train", "heldout"


def held_out(
    split: float | str, sources: Sequence[str], content: np.ndarray, families: np.ndarray, accepted: np.ndarray
) -> np.ndarray:
    """Which accepted clips are held out: (n,) bool.

    `split` is a share (a clip is held out if the hash of its content lies below it, so that later clips move none), or
    the path of a list of sources, one a line. Clips of one family (`families`: the same or alike) go together. A share
    above 0 holds out at least one family of five or more. Raises `ConfigError` for a share outside [0, 1), `DataError`
    for a list that names what is not there.
    """
    held = np.zeros(len(sources), dtype=bool)
    if isinstance(split, str):
        held = _listed(split, sources)
    else:
        check_share(split)
        held = _drawn(split, content, families, accepted) if split > 0 else held
    chosen = np.zeros(len(sources), dtype=bool)
    chosen[families[held & accepted]] = True
    return np.asarray(chosen[families] & accepted)


def check_share(split: float) -> None:
    """Raise `ConfigError` for a share outside [0, 1)."""
    if not 0 <= split < 1:
        raise ConfigError(f"split is {split}; give the share to hold out, from 0 to below 1, or the path of a list.")


def read_list(path: str) -> set[str]:
    """The sources that a held-out list names. Raises `DataError` when it cannot be read, or names none."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the held-out list {path} ({error}): give a text file, or a share.") from error
    named = {line.strip().removeprefix("./") for line in lines if line.strip()}
    if not named:
        raise DataError(f"the held-out list {path} names no clip: write sources, one a line, or give split=0.")
    return named


def _drawn(share: float, content: np.ndarray, families: np.ndarray, accepted: np.ndarray) -> np.ndarray:
    heads = np.unique(families[accepted])
    draws = np.array([_uniform(bytes(content[head])) for head in heads])
    held = np.zeros(len(content), dtype=bool)
    held[heads[draws < share]] = True
    if len(heads) >= 5 and not held.any():
        held[heads[draws.argmin()]] = True
    # A family is accepted through any of its clips, while its head may itself be rejected.
    return np.asarray(held[families])


def _uniform(content: bytes) -> float:
    return int.from_bytes(hashlib.sha256(b"split" + content).digest()[:8], "big") / 2**64


def _listed(path: str, sources: Sequence[str]) -> np.ndarray:
    wanted = read_list(path)
    unknown = sorted(wanted - set(sources))
    if unknown:
        raise DataError(
            f"the held-out list {path} names {len(unknown)} clip(s) that are not in the source, such as {unknown[0]}. "
            f"Write paths as they are within the source, one a line."
        )
    return np.array([source in wanted for source in sources], dtype=bool)
