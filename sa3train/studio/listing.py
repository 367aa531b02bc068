"""What lies in a studio's folders: models, adapters, audio. Listings are bounded: a root may be a whole home folder."""

import os
from collections.abc import Iterator
from pathlib import Path

from sa3train.audio.io import AUDIO_SUFFIXES
from sa3train.errors import SA3Error
from sa3train.inference.request import BASE_CFG, BASE_SAMPLER, BASE_STEPS, POST_CFG, POST_SAMPLER, POST_STEPS
from sa3train.models.config import ModelConfig
from sa3train.models.parse import parse_model, read_config
from sa3train.models.registry import REGISTRY
from sa3train.models.sources import CONFIG_FILE, WEIGHTS_FILE, cached_names, locate
from sa3train.studio.workplace import StudioError, Workplace

MOST_FOLDERS = 4000
DEEPEST = 8
MOST_LISTED = 400

ADAPTER_CONFIG = "adapter_config.json"


def folders(place: Workplace) -> Iterator[tuple[Path, list[str]]]:
    """Every folder under the roots with the names of its files; hidden ones are left out."""
    seen = 0
    for root in place.roots:
        for parent, below, files in os.walk(root):
            here = Path(parent)
            deep = len(here.relative_to(root).parts) >= DEEPEST
            below[:] = [] if deep else sorted(name for name in below if not name.startswith((".", "__")))
            seen += 1
            if seen > MOST_FOLDERS:
                return
            yield here, sorted(name for name in files if not name.startswith("."))


def adapters(place: Workplace) -> list[str]:
    """Adapter files and PEFT folders under the roots, newest first, as `Workplace.shown` says them."""
    found = []
    for here, files in folders(place):
        if ADAPTER_CONFIG in files:
            found.append(here)
            continue
        whole = CONFIG_FILE in files
        found += [
            here / name for name in files if name.endswith(".safetensors") and not (whole and name == WEIGHTS_FILE)
        ]
    return _newest(place, found)


def audio(place: Workplace) -> list[str]:
    """Audio files under the roots, newest first."""
    return _newest(place, [here / name for here, files in folders(place) for name in files if _is_audio(name)])


def models(place: Workplace) -> list[tuple[str, str]]:
    """(label, value) of every model that can be chosen: by name, and folders under the roots."""
    here = {"nano", "nano-base", *cached_names()}
    named = [entry.name for entry in REGISTRY.values() if entry.kind == "model"]
    choices = [(name if name in here else f"{name} (not downloaded yet)", name) for name in named]
    for folder, files in folders(place):
        if CONFIG_FILE in files and WEIGHTS_FILE in files:
            choices.append((place.shown(folder), str(folder)))
    if place.model not in [value for _, value in choices]:
        choices.append((place.model, place.model))
    return choices


def model_name(place: Workplace, name: str) -> str:
    """`name`, if it is one of the registry, the one the studio was started with, or a folder under the roots."""
    if name in REGISTRY or name == place.model:
        return name
    return str(place.folder(name, "model folder"))


def config_of(place: Workplace, name: str) -> ModelConfig | None:
    """The model's configuration, or None while that would mean a download. Raises `SA3Error` for no model."""
    name = model_name(place, name)
    entry = REGISTRY.get(name)
    if entry is not None and entry.repo_id is not None and name not in cached_names():
        return None
    files = locate(name)
    return parse_model(read_config(files.config), str(files.config))


def defaults_of(config: ModelConfig) -> tuple[int, float, str]:
    """Steps, guidance and sampler that a request leaves to the model."""
    if config.objective == "rectified_flow":
        return BASE_STEPS, BASE_CFG, BASE_SAMPLER
    return POST_STEPS, POST_CFG, POST_SAMPLER


def model_facts(place: Workplace, name: str) -> str:
    """A line on a model: what it is and how far it reaches."""
    try:
        config = config_of(place, name)
    except SA3Error as error:
        return str(error)
    if config is None:
        entry = REGISTRY[name]
        return f"{name} is downloaded when it is first used. Its licence: {entry.licence}, {entry.page}."
    kind = "base model" if config.objective == "rectified_flow" else "post-trained model"
    longest = config.sample_size / config.sample_rate
    steps, cfg, sampler = defaults_of(config)
    return f"{kind}, up to {longest:.0f} s; by default {steps} steps, guidance {cfg:g}, {sampler}"


def sibling_of(name: str) -> str:
    """The base of a post-trained model, or the other way round. Raises `StudioError` when it has none."""
    entry = REGISTRY.get(name)
    if entry is None or entry.sibling is None:
        raise StudioError(f"{name} has no known twin: base and post-trained can be compared for the named models.")
    return entry.sibling


def _is_audio(name: str) -> bool:
    return name.lower().endswith(AUDIO_SUFFIXES)


def _newest(place: Workplace, paths: list[Path]) -> list[str]:
    dated = sorted(((path.stat().st_mtime, path) for path in paths if path.exists()), reverse=True)
    return [place.shown(path) for _, path in dated[:MOST_LISTED]]
