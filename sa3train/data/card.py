"""The card of a set of latents: what it is, how it was made, and how to use it, for people."""

from pathlib import Path
from typing import Any

from sa3train.data.audit_report import Summary
from sa3train.files import write_text


def write_card(folder: Path, index: dict[str, Any], audit: Summary) -> None:
    """Write `README.md` beside the shards."""
    model, settings = index["model"], index["settings"]
    splits = "\n".join(
        f"| {name} | {split['clips']:.0f} | {split['seconds'] / 60:.1f} |"
        for name, split in sorted(index["splits"].items())
    )
    kinds = "\n".join(f"- {code}: {count}" for code, count in sorted(audit.findings.items())) or "- none"
    listed = "\n".join(f"| {name} | {value} |" for name, value in settings.items())
    write_text(
        folder / "README.md",
        f"""# Latents of {index["source"]}

{index["clips"]:.0f} takes, {index["seconds"] / 60:.1f} minutes, for training Stable Audio 3 adapters with sa3train.
{index["rejected"]} clips were rejected (`rejected.jsonl`); the audit is in `audit.html` and `audit.json`.

| split | takes | minutes |
|---|---|---|
{splits}

Made by {index["made_by"]} with the autoencoder of `{model["name"]}` (weights {model["fingerprint"][:16]}),
{model["latent_channels"]} channels, {model["downsampling_ratio"]} samples a frame.

| setting | value |
|---|---|
{listed}

Found by the audit (clips):

{kinds}

The shards are WebDataset tars: `<key>.npy` (float16 latents, channels × frames) and `<key>.json` (caption, tags,
seconds, source, hashes). `index.json` describes them. Manifest hash: `{index["manifest"]}`.

The latents can be decoded back to audio: the licence and terms of the source recordings hold for them too.
""",
    )
