"""What was done to an adapter, kept in its metadata from file to file."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sa3train import __version__
from sa3train.adapters.adapter import Adapter
from sa3train.adapters.tools.low_rank import Cut
from sa3train.core.safetensors_file import parse_json

HISTORY = "sa3train_history"


def history_of(adapter: Adapter) -> list[Any]:
    """What tools of this project did to `adapter` so far, as recorded in its metadata."""
    text = adapter.metadata.get(HISTORY)
    found = parse_json(text, HISTORY) if text else []
    return found if isinstance(found, list) else []


def cut_record(cut: Cut) -> dict[str, Any]:
    """The rank or the share of energy asked for."""
    return {name: value for name, value in (("rank", cut.rank), ("energy", cut.energy)) if value is not None}


def source_record(adapter: Adapter, strength: float) -> dict[str, Any]:
    """An adapter that went into a merge."""
    spec = adapter.spec
    record = {"source": Path(adapter.source).name, "kind": spec.kind, "rank": spec.rank, "strength": strength}
    return record | {"fingerprint": adapter.fingerprint}


def extended(adapter: Adapter, tool: str, **facts: Any) -> dict[str, str]:
    """The metadata of `adapter` with one more entry of its history."""
    return recorded(adapter.metadata, tool, history_of(adapter), **facts)


def recorded(metadata: Mapping[str, str], tool: str, history: list[Any], **facts: Any) -> dict[str, str]:
    """`metadata` with `history` and one more entry: what `tool` did, and how."""
    entry = {"tool": tool, "sa3train_version": __version__, **facts}
    return {**metadata, HISTORY: json.dumps([*history, entry])}
