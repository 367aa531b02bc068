"""The history of an adapter: what the tools of this project did to it, kept in its metadata from file to file."""

import json
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from sa3train import __version__
from sa3train.adapters.adapter import MAX_PROMPTS, PROMPTS, Adapter
from sa3train.core.safetensors_file import parse_json

HISTORY = "sa3train_history"


def read_history(adapter: Adapter) -> list[Any]:
    """Read the history of an adapter.

    Args:
        adapter: The adapter.

    Returns:
        One entry per tool that was run, oldest first.
    """
    text = adapter.metadata.get(HISTORY)
    found = parse_json(text, HISTORY) if text else []
    return found if isinstance(found, list) else []


def write_history(metadata: Mapping[str, str], history: list[Any], tool: str, **facts: Any) -> dict[str, str]:
    """Write a history with one more entry into metadata.

    Args:
        metadata: The metadata to start from.
        history: Earlier entries.
        tool: Name of the tool that was run.
        **facts: Its settings.

    Returns:
        New metadata.
    """
    entry = {"tool": tool, "sa3train_version": __version__, **facts}
    return {**metadata, HISTORY: json.dumps([*history, entry])}


def append_history(adapter: Adapter, tool: str, **facts: Any) -> dict[str, str]:
    """Append an entry to the history of an adapter.

    Args:
        adapter: The adapter, which stays as it is.
        tool: Name of the tool that was run.
        **facts: Its settings.

    Returns:
        The adapter's metadata with the new entry.
    """
    return write_history(adapter.metadata, read_history(adapter), tool, **facts)


def merge_metadata(adapters: Sequence[Adapter], strengths: Sequence[float], tool: str, **facts: Any) -> dict[str, str]:
    """Merge the metadata of adapters that were merged: what all of them share, their prompts, and a new history.

    Args:
        adapters: The adapters.
        strengths: The strength of each.
        tool: Name of the tool that was run.
        **facts: Its settings.

    Returns:
        The metadata; a single adapter keeps its history. Prompts are those of the adapters that were added, in turns.
    """
    first, *others = adapters
    shared = {
        key: value
        for key, value in first.metadata.items()
        if key not in ("lora_config", HISTORY) and all(other.metadata.get(key) == value for other in others)
    }
    added = [adapter.prompts for adapter, strength in zip(adapters, strengths, strict=True) if strength > 0]
    prompts = dict.fromkeys(prompt for turn in zip_longest(*added) for prompt in turn if prompt)
    if others and prompts:
        shared[PROMPTS] = json.dumps(list(prompts)[:MAX_PROMPTS], ensure_ascii=False)
    sources = [describe_source(*pair) for pair in zip(adapters, strengths, strict=True)]
    return write_history(shared, [] if others else read_history(first), tool, **facts, of=sources)


def describe_source(adapter: Adapter, strength: float) -> dict[str, Any]:
    """Describe an adapter that was merged into something.

    Args:
        adapter: The adapter.
        strength: The strength it was merged with.

    Returns:
        Its file name, type, rank, strength and fingerprint.
    """
    return {
        "source": Path(adapter.source).name,
        "adapter_type": adapter.spec.adapter_type,
        "rank": adapter.spec.rank,
        "strength": strength,
        "fingerprint": adapter.fingerprint,
    }
