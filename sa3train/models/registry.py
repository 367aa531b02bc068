"""The checkpoints known by name: where they come from, what they are, and which is whose twin."""

import difflib
from dataclasses import dataclass
from typing import Literal

from sa3train.errors import CheckpointError

HUB = "https://huggingface.co"


@dataclass(frozen=True)
class Entry:
    """One named checkpoint. `sibling` is the base of a post-trained model or the other way round."""

    name: str
    kind: Literal["model", "autoencoder"]
    repo_id: str | None  # None: made on this machine
    licence: str
    sibling: str | None = None

    @property
    def page(self) -> str | None:
        """The hub page on which the licence is accepted."""
        return None if self.repo_id is None else f"{HUB}/{self.repo_id}"


_COMMUNITY = "Stability AI Community License"
_OWN = "Apache-2.0"


def _pair(name: str, repo_id: str | None, licence: str) -> list[Entry]:
    base = f"{name}-base"
    base_repo = None if repo_id is None else f"{repo_id}-base"
    return [
        Entry(name, "model", repo_id, licence, sibling=base),
        Entry(base, "model", base_repo, licence, sibling=name),
    ]


REGISTRY: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        *_pair("nano", None, _OWN),
        *_pair("small-music", "stabilityai/stable-audio-3-small-music", _COMMUNITY),
        *_pair("small-sfx", "stabilityai/stable-audio-3-small-sfx", _COMMUNITY),
        *_pair("medium", "stabilityai/stable-audio-3-medium", _COMMUNITY),
        Entry("same-s", "autoencoder", "stabilityai/SAME-S", _COMMUNITY),
        Entry("same-l", "autoencoder", "stabilityai/SAME-L", _COMMUNITY),
    )
}


def find(name: str) -> Entry | None:
    """The entry called `name`, or whose repository is `name`; None when there is none."""
    if name in REGISTRY:
        return REGISTRY[name]
    return next((entry for entry in REGISTRY.values() if entry.repo_id is not None and entry.repo_id == name), None)


def unknown(name: str) -> CheckpointError:
    """The error for a name that is neither known nor a folder, with the nearest name and the list."""
    close = difflib.get_close_matches(name.lower(), REGISTRY, n=1, cutoff=0.6)
    guess = f" Did you mean {close[0]}?" if close else ""
    return CheckpointError(
        f"there is no model called {name!r} and no folder of that name.{guess} "
        f"Known names: {', '.join(REGISTRY)}; or give a folder with model_config.json and model.safetensors."
    )
