"""Making a recorded generation again, and saying what has changed since."""

from pathlib import Path
from typing import Any

import torch

from sa3train.core.errors import RequestError
from sa3train.inference.generator import Generator
from sa3train.inference.outputs import GenerationOutput
from sa3train.inference.sidecar import environment, find_unchanged


def again(generator: Generator, record: dict[str, Any], folder: Path) -> GenerationOutput:
    """Generate what `record`, a sidecar that lay in `folder`, says, on a generator without adapters.

    Raises `RequestError` when the model, an adapter or an input is not what was used, or its seed is unknown.
    """
    now = generator.model
    for part, fingerprint in (("fingerprint", now.fingerprint()), ("autoencoder", now.autoencoder.fingerprint())):
        if fingerprint != record["model"][part]:
            raise RequestError(
                f"model {record['model']['source']} has changed since: its {part} is {fingerprint[:12]}…, and "
                f"{record['model'][part][:12]}… was used. Give the model as it was with --model."
            )
    if record["settings"]["seed"] is None:
        raise RequestError("the draws came from a generator of the caller's own: this result cannot be made again.")
    for entry in record["adapters"]:
        generator.load_adapter(
            find_unchanged(entry, folder, "adapter"),
            entry["strength"],
            conditioner_strength=entry["conditioner_strength"],
            interval=tuple(entry["interval"]),
            exclude_layers=entry["exclude_layers"],
            allow_partial=entry["allow_partial"],
        )
    settings = {name: value for name, value in record["settings"].items() if value is not None}
    inputs: dict[str, Any] = {
        role: find_unchanged(entry, folder, role) for role, entry in record["inputs"].items() if entry
    }
    return generator.generate(**settings, **inputs)


def difference(record: dict[str, Any], result: GenerationOutput, device: torch.device) -> str:
    """Empty when `result` gives the recorded bytes; else what differs, and what of the environment has changed."""
    item, subtype = record["item"], record["subtype"]
    made = result.sidecar(item, record["file"], result.encoded(item, Path(record["file"]).suffix, subtype), subtype)
    if made["sha256"] == record["sha256"]:
        return ""
    if made["audio_sha256"] == record["audio_sha256"]:
        return "the same audio in other bytes: Ogg files bear a random number, and encoders change with their version."
    then, now = record["environment"], environment(device)
    changes = [f"{name} {then.get(name)} is now {value}" for name, value in now.items() if then.get(name) != value]
    return f"the audio is not the same as recorded ({'; '.join(changes) or 'in the same environment'})."
