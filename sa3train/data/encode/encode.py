"""Encode a source into latent shards: audit, plan, encode, index. Safe to kill at any moment and to run again.

`encode_source` is the whole of it. Several processes (`Workers`) share one output folder: each audits and encodes its
share and writes shards of its own; the first one sets aside what is stale, and writes the index.

The card of a set of latents: what it is, how it was made, and how to use it, for people.
"""

import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from sa3train.core.errors import DataError
from sa3train.core.files import atomic_path, write_bytes, write_text
from sa3train.core.log import get_logger
from sa3train.data.audit.audit import AuditIndex, Rules, journal_stamps, problem_rows, run_audit
from sa3train.data.audit.checks import reason
from sa3train.data.audit.report import Summary, write_audit
from sa3train.data.encode.encoder import Encoder
from sa3train.data.encode.fixes import chosen_fixes
from sa3train.data.encode.pipeline import EncodeRun
from sa3train.data.encode.plan import (
    SPLITS,
    EncodePlan,
    EncodeSettings,
    Kept,
    done_keys,
    kept_latents,
    read_list,
    reconcile,
)
from sa3train.data.encode.workers import Workers, claim, settle, work_folder
from sa3train.data.shards.index import SILENCE, build_index, remove_outdated, shard_files
from sa3train.data.shards.writer import STALE, ShardWriter
from sa3train.data.sources.listing import Listing, describe_skipped, list_source
from sa3train.data.sources.storage import is_url


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


_logger = get_logger(__name__)

AUDIT_VERSION = 1
"""Raised when audit rows change, so that old journals are not used."""


@dataclass
class EncodeReport:
    """What an encode did. `seconds`, `padding` and `elapsed` (wall time of encoding alone) are of this process and run;
    `index` and `audit` of the whole set, on the first process only.
    """

    folder: Path
    encoded: int = 0
    reused: int = 0
    seconds: float = 0.0
    padding: float = 0.0
    elapsed: float = 0.0
    index: dict[str, Any] = field(default_factory=dict)
    audit: Summary | None = None


def encode_source(
    source: str,
    out: str | Path,
    encoder: Encoder,
    settings: EncodeSettings,
    rules: Rules,
    workers: Workers | None = None,
) -> EncodeReport:
    """Audit `source`, encode what can be, and leave shards, `index.json`, `rejected.jsonl`, `silence.npy`, the audit
    and a card in `out`. What an earlier run has done is kept.

    Raises `DataError` when more than `settings.max_rejected` of the clips are rejected (they are listed all the same),
    when nothing is left, when `out` holds latents made otherwise, or when it cannot be written.
    """
    workers, folder = workers or Workers(), Path(out)
    basis = latent_basis(encoder, settings)
    _check_places(settings)
    with claim(folder, workers):
        if workers.first:
            settle(folder, {"source": _absolute(source), **basis}, settings.overwrite)
        workers.wait()
        listing = list_clips(source, folder)
        index = audit_clips(listing, rules, work_folder(folder), workers, settings.threads)
        plan = EncodePlan(index, settings, basis)
        _check_rejected(source, folder, plan, workers)
        if workers.first:
            _forget_rejections(folder)
            reconcile(folder, plan.digests(), workers.world)
        workers.wait()
        done = done_keys(folder)
        kept = kept_latents(folder, Path(settings.reuse) if settings.reuse else None)
        workers.wait()
        report = EncodeReport(folder)
        _encode_share(plan, encoder, listing, done, kept, workers, report)
        workers.wait()
        if workers.first:
            _finish(source, folder, plan, encoder, report)
        workers.wait()
    return report


def _check_places(settings: EncodeSettings) -> None:
    """Refuse what is named and is not there before the audit, which may take hours."""
    if isinstance(settings.split, str):
        read_list(settings.split)
    if settings.reuse and not shard_files(Path(settings.reuse)):
        raise DataError(f"reuse={settings.reuse} holds no latent shards: give a folder that sa3-encode made.")


def latent_basis(encoder: Encoder, settings: EncodeSettings) -> dict[str, Any]:
    """Everything besides its audio that a latent depends on."""
    model = encoder.model
    return {
        "autoencoder": model["fingerprint"],
        "sample_rate": model["sample_rate"],
        "precision": encoder.precision,
        "chunked": encoder.chunked,
        "fix": list(chosen_fixes(settings.fix)),
    }


def _absolute(source: str) -> str:
    return source if is_url(source) else str(Path(source).resolve())


def list_clips(source: str, out: Path | None = None) -> Listing:
    """`list_source`, with what it skipped said aloud. Raises `DataError` when `out` lies inside the source."""
    if out is not None and not is_url(source) and out.resolve().is_relative_to(Path(source).resolve()):
        raise DataError(f"the output folder {out} lies inside the source {source}: choose one outside of it.")
    listing = list_source(source)
    skipped = describe_skipped(listing)
    if skipped:
        _logger.info("not audio, left alone: %s", skipped)
    return listing


def audit_clips(listing: Listing, rules: Rules, work: Path, workers: Workers, threads: int) -> AuditIndex:
    """Audit every clip that no journal in `work` covers, each process its share; returns the index over all."""
    signature = f"{AUDIT_VERSION}|{rules.captions}|{rules.longest_seconds}|{rules.max_tokens}"
    for clip in listing.clips:
        clip.stamp = hashlib.blake2b(f"{clip.stamp}|{signature}".encode("utf-8", "replace"), digest_size=12).hexdigest()
    work.mkdir(parents=True, exist_ok=True)
    known = journal_stamps(sorted(work.glob("audit-*.jsonl")))
    missing = [clip for clip in listing.clips if known.get(clip.source) != clip.stamp]
    _logger.info("audit: %d clips, %d of them known", len(listing.clips), len(listing.clips) - len(missing))
    workers.wait()
    journal = work / f"audit-{workers.rank:03d}.jsonl"
    run_audit(missing[workers.rank :: workers.world], rules, journal, known, threads)
    workers.wait()
    wanted = {clip.source: clip.stamp for clip in listing.clips}
    return AuditIndex(sorted(work.glob("audit-*.jsonl")), wanted, problem_rows(listing))


def _check_rejected(source: str, folder: Path, plan: EncodePlan, workers: Workers) -> None:
    total, rejected = len(plan.index), int((~plan.accepted).sum())
    if rejected < total and rejected <= plan.settings.max_rejected * total:
        return
    if workers.first:
        _write_rejected(folder, plan.rejected())
        write_audit(folder, source, plan.index.rows())
    first = next(plan.rejected())
    raise DataError(
        f"{rejected} of {total} clips of {source} are rejected, more than max_rejected={plan.settings.max_rejected:g} "
        f"allows; the first: {first['source']}, {reason(first)}. All are in {folder / 'rejected.jsonl'}, pictures in "
        f"{folder / 'audit.html'}. Mend them, or raise max_rejected."
    )


def _write_rejected(folder: Path, rows: Iterator[dict[str, Any]]) -> int:
    count = 0
    with atomic_path(folder / "rejected.jsonl") as path, path.open("w", encoding="utf-8") as file:
        for row in rows:
            codes = [found["code"] for found in row["findings"] if found["severity"] == "error"]
            file.write(json.dumps({"source": row["source"], "reason": reason(row), "codes": codes}) + "\n")
            count += 1
    return count


def _encode_share(
    plan: EncodePlan,
    encoder: Encoder,
    listing: Listing,
    done: set[str],
    kept: dict[str, Kept],
    workers: Workers,
    report: EncodeReport,
) -> None:
    """Encode this process's batches into its shards; what fails is listed in its journal of rejections."""
    folder, settings = report.folder, plan.settings
    seconds = settings.batch_seconds or encoder.batch_seconds()
    _logger.info("encode: %d clips, %d takes done before", int(plan.accepted.sum()), len(done))
    run = EncodeRun(plan, encoder, {clip.source: clip for clip in listing.clips}, done, kept)
    with (
        ShardWriter(folder, SPLITS[0], workers.rank, settings.shard_bytes) as train,
        ShardWriter(folder, SPLITS[1], workers.rank, settings.shard_bytes) as heldout,
        (work_folder(folder) / f"rejected-{workers.rank:03d}.jsonl").open("w", encoding="utf-8") as rejected,
    ):
        writers = {SPLITS[0]: train, SPLITS[1]: heldout}
        for outcome in run.outcomes(plan.batches(seconds)[workers.rank :: workers.world]):
            if outcome.latent_CT is None:
                rejected.write(json.dumps({"source": outcome.record["source"], "finding": outcome.fault}) + "\n")
                rejected.flush()
            else:
                writers[outcome.record["split"]].add(outcome.latent_CT, outcome.record)
    report.encoded, report.reused, report.seconds = run.encoded, run.reused, run.seconds
    report.padding, report.elapsed = run.padding, run.elapsed


def _forget_rejections(folder: Path) -> None:
    for path in work_folder(folder).glob("rejected-*.jsonl"):
        path.unlink()


def _finish(source: str, folder: Path, plan: EncodePlan, encoder: Encoder, report: EncodeReport) -> None:
    """Write everything that describes the set; then let go of what was set aside."""
    failed = _failed(folder)

    def rows() -> Iterator[dict[str, Any]]:
        for row in plan.index.rows():
            faults = failed.get(row["source"], [])
            yield {**row, "findings": [*row["findings"], *faults]}

    def rejected() -> Iterator[dict[str, Any]]:
        yield from plan.rejected()
        yield from (row for row in rows() if row["source"] in failed)

    count = _write_rejected(folder, rejected())
    report.audit = write_audit(folder, source, rows())
    silence = io.BytesIO()
    np.save(silence, encoder.silence(), allow_pickle=False)
    write_bytes(folder / SILENCE, silence.getvalue())
    described = {
        "made_by": f"sa3train {version('sa3train')}",
        "source": source,
        "rejected": count,
        "silence": {"file": SILENCE, "sha256": hashlib.sha256(silence.getvalue()).hexdigest()},
    }
    report.index = build_index(folder, {"model": encoder.model, "settings": _settings_for_index(plan)}, described)
    write_card(folder, report.index, report.audit)
    remove_outdated(folder)
    for stale in folder.glob(f"*{STALE}"):
        stale.unlink()
    if count > plan.settings.max_rejected * len(plan.index):
        raise DataError(
            f"{count} of {len(plan.index)} clips are rejected, more than max_rejected={plan.settings.max_rejected:g} "
            f"allows. The others are encoded; see {folder / 'rejected.jsonl'}, mend them, and run the command again."
        )


def _failed(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """source → findings of what could not be encoded in this run, by any process."""
    failed: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(work_folder(folder).glob("rejected-*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            failed.setdefault(row["source"], [])
            if row["finding"] not in failed[row["source"]]:
                failed[row["source"]].append(row["finding"])
    return failed


def _settings_for_index(plan: EncodePlan) -> dict[str, Any]:
    settings = plan.settings
    return {
        **{name: value for name, value in plan.basis.items() if name != "autoencoder"},
        "views": list(settings.views),
        "split": settings.split,
        "duplicates": settings.duplicates,
        "captions": settings.captions,
    }
