"""Encode a source into latent shards: audit, plan, encode, index. Safe to kill at any moment and to run again.

`encode_dataset` runs all stages. Several processes (`Workers`) share one output folder: each audits and encodes its
share and writes its own shards; the main one sets aside outdated shards and writes the index.
"""

import dataclasses
import hashlib
import io
import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Template

from sa3train.core.errors import DataError
from sa3train.core.files import replace_file, write_bytes, write_text
from sa3train.core.log import get_logger
from sa3train.data.audit.audit import (
    AuditIndex,
    AuditRules,
    compute_audit_version,
    list_problem_rows,
    read_stamps,
    run_audit,
)
from sa3train.data.audit.checks import ERROR, FINDING_TYPES, describe_rejection
from sa3train.data.audit.report import AuditSummary, write_audit_report
from sa3train.data.encode.encoder import Encoder
from sa3train.data.encode.fixes import order_fixes
from sa3train.data.encode.imported import check_imported
from sa3train.data.encode.pipeline import EncodePipeline
from sa3train.data.encode.plan import (
    SPLITS,
    EncodePlan,
    find_reusable_latents,
    list_encoded_keys,
    read_heldout_list,
    reconcile_shards,
)
from sa3train.data.encode.settings import EncodeSettings
from sa3train.data.encode.workers import Workers, get_work_dir, lock_output_dir, record_settings
from sa3train.data.shards.index import SILENCE_FILE, build_index, list_shards, remove_outdated
from sa3train.data.shards.writer import STALE, ShardWriter
from sa3train.data.sources.listing import Listing, list_source
from sa3train.data.sources.names import find_common_words
from sa3train.data.sources.storage import is_url

_logger = get_logger(__name__)
_CARD = Path(__file__).parents[2] / "assets" / "latents.md"


@dataclass
class EncodeResult:
    """What an encode did.

    Attributes:
        folder: Output folder.
        encoded: Number of latents computed by this process.
        reused: Number of latents this process copied from an earlier run.
        seconds: Audio encoded by this process, in seconds.
        padding: Share of the computed samples that belong to no clip.
        elapsed: Wall time spent in the autoencoder, in seconds.
        index: Content of `index.json`; on the main process only.
        audit: Counts of the audit; on the main process only.
        audited: Number of clips that were audited; the others were cached.
    """

    folder: Path
    encoded: int = 0
    reused: int = 0
    seconds: float = 0.0
    padding: float = 0.0
    elapsed: float = 0.0
    index: dict[str, Any] = field(default_factory=dict)
    audit: AuditSummary | None = None
    audited: int = 0


def encode_dataset(
    source: str,
    out: str | Path,
    encoder: Encoder,
    settings: EncodeSettings,
    rules: AuditRules,
    workers: Workers | None = None,
) -> EncodeResult:
    """Encode a source into a folder of latent shards; what earlier runs have done is kept.

    Leaves shards, `index.json`, `rejected.jsonl`, `silence.npy`, the audit and a card.

    Args:
        source: Folder, audio file, manifest, tar, or a URL of one of these; or a folder of latents of another tool.
        out: Output folder.
        encoder: The autoencoder with its choices.
        settings: Settings of the encode.
        rules: What the audit checks.
        workers: This process among those that share the work; None for a single process.

    Returns:
        What was done. A `DataError` is raised when more than `settings.max_rejected` of the clips are rejected (they
        are listed nevertheless), nothing is left to encode, `out` contains latents made with other settings, or it
        cannot be written.
    """
    workers, folder = workers or Workers(), Path(out)
    basis = collect_latent_settings(encoder, settings)
    _check_named_files(settings)
    listing = list_clips(source, folder)
    with lock_output_dir(folder, workers):
        if any(clip.is_latents for clip in listing.clips):
            check_imported(listing, encoder, settings, source)
            basis |= {"precision": "imported", "chunked": None}
        if workers.is_main:
            absolute = source if is_url(source) else str(Path(source).resolve())
            record_settings(folder, {"source": absolute, **basis}, settings.overwrite)
        workers.wait()
        index = audit_clips(listing, rules, get_work_dir(folder), workers, settings.count_threads())
        plan = EncodePlan(index, settings, basis)
        _check_rejected(source, folder, plan, workers)
        if workers.is_main:
            for path in get_work_dir(folder).glob("rejected-*.jsonl"):
                path.unlink()
            reconcile_shards(folder, plan.compute_digests(), workers.world_size)
        workers.wait()
        result = _encode_share(plan, encoder, listing, folder, workers)
        result.audited = index.audited
        if workers.is_main:
            _write_descriptions(source, folder, plan, encoder, result)
        workers.wait()
    return result


def _check_named_files(settings: EncodeSettings) -> None:
    """Check that named files exist before the audit, which may take hours."""
    if isinstance(settings.split, str):
        read_heldout_list(settings.split)
    if settings.reuse and not list_shards(Path(settings.reuse)):
        raise DataError(f"reuse={settings.reuse} contains no latent shards: give a folder that sa3-encode made.")


def collect_latent_settings(encoder: Encoder, settings: EncodeSettings) -> dict[str, Any]:
    """Collect everything besides its audio that a latent depends on.

    Args:
        encoder: The autoencoder with its choices.
        settings: Settings of the encode.

    Returns:
        Values for JSON.
    """
    return {
        "autoencoder": encoder.model["fingerprint"],
        "sample_rate": encoder.model["sample_rate"],
        "precision": encoder.precision,
        "chunked": encoder.chunked,
        "fixes": order_fixes(settings.fixes),
    }


def list_clips(source: str, out: Path | None = None) -> Listing:
    """List the clips of a source, and log what is skipped.

    Args:
        source: Folder, audio file, manifest, tar, or a URL of one of these.
        out: Output folder; None for none.

    Returns:
        The listing.

    Raises:
        DataError: When `out` is the source.
    """
    if out is not None and not is_url(source) and out.resolve() == Path(source).resolve():
        raise DataError(f"the output folder {out} is the source itself: choose another.")
    listing = list_source(source)
    if listing.skipped:
        _logger.info("Skipped files that are not audio: %s", listing.describe_skipped())
    return listing


def audit_clips(listing: Listing, rules: AuditRules, work_dir: Path, workers: Workers, threads: int) -> AuditIndex:
    """Audit the clips that no journal covers yet, each process its share.

    Args:
        listing: Clips to audit.
        rules: What to check.
        work_dir: Folder of the journals.
        workers: This process among those that share the work.
        threads: Number of clips decoded at a time.

    Returns:
        The audit of all clips.
    """
    if rules.captions == "auto":
        common = find_common_words(clip.source for clip in listing.clips)
        rules = dataclasses.replace(rules, common_words=common)
    limits = (rules.captions, rules.allow_promotional, rules.longest_seconds, rules.max_tokens, rules.template)
    chosen = [*limits, *sorted(rules.common_words)]
    signature = "|".join(map(str, (compute_audit_version(), *chosen)))
    for clip in listing.clips:
        clip.stamp = hashlib.blake2b(f"{clip.stamp}|{signature}".encode("utf-8", "replace"), digest_size=12).hexdigest()
    work_dir.mkdir(parents=True, exist_ok=True)
    known = read_stamps(sorted(work_dir.glob("audit-*.jsonl")))
    missing = [clip for clip in listing.clips if known.get(clip.source) != clip.stamp]
    _logger.info("Audit: %d clips, %d cached", len(listing.clips), len(listing.clips) - len(missing))
    workers.wait()
    journal = work_dir / f"audit-{workers.rank:03d}.jsonl"
    run_audit(missing[workers.rank :: workers.world_size], rules, journal, known, threads)
    workers.wait()
    stamps = {clip.source: clip.stamp for clip in listing.clips}
    index = AuditIndex(sorted(work_dir.glob("audit-*.jsonl")), stamps, list_problem_rows(listing))
    index.audited = len(missing)
    return index


def _check_rejected(source: str, folder: Path, plan: EncodePlan, workers: Workers) -> None:
    total, rejected = len(plan.index), int(plan.index.rejected.sum())
    if rejected < total and rejected <= plan.settings.max_rejected * total:
        return
    if workers.is_main:
        _write_rejected(folder, plan.iterate_rejected())
        write_audit_report(folder, source, plan.index.iterate_rows(), _list_applied(plan.settings))
    first = plan.index.row(int(plan.index.rejected.argmax()))
    code = next(finding["code"] for finding in first["findings"] if finding["severity"] == ERROR)
    raise DataError(
        f"{rejected} of {total} clips of {source} are rejected, more than max_rejected={plan.settings.max_rejected:g} "
        f"allows; the first: {first['source']}, {describe_rejection(first).rstrip('.')}. All are listed in "
        f"{folder / 'rejected.jsonl'}, with waveforms in {folder / 'audit.html'}. Fix them "
        f"({FINDING_TYPES[code].fix}), or raise max_rejected."
    )


def _list_applied(settings: EncodeSettings) -> list[str]:
    """The settings that fixes of findings name."""
    return [f"duplicates={settings.duplicates}", *(f"fixes={name}" for name in settings.fixes)]


def _write_rejected(folder: Path, rows: Iterable[dict[str, Any]]) -> int:
    count = 0
    with replace_file(folder / "rejected.jsonl") as path, path.open("w", encoding="utf-8") as file:
        for row in rows:
            codes = [finding["code"] for finding in row["findings"] if finding["severity"] == ERROR]
            rejection = {"source": row["source"], "reason": describe_rejection(row), "codes": codes}
            file.write(json.dumps(rejection) + "\n")
            count += 1
    return count


def _encode_share(plan: EncodePlan, encoder: Encoder, listing: Listing, folder: Path, workers: Workers) -> EncodeResult:
    """Encode this process's batches into its shards; failures are listed in its journal of rejections."""
    settings = plan.settings
    done = list_encoded_keys(folder)
    reusable = find_reusable_latents(folder, Path(settings.reuse) if settings.reuse else None)
    workers.wait()  # all have read the shards before any writes
    _logger.info("Encode: %d clips, %d latents cached", int(plan.accepted.sum()), len(done))
    pipeline = EncodePipeline(plan, encoder, {clip.source: clip for clip in listing.clips}, done, reusable)
    batches = plan.make_batches(settings.batch_seconds or encoder.estimate_batch_seconds())
    shard_bytes = settings.shard_mb * 1_000_000
    with (
        ShardWriter(folder, SPLITS[0], workers.rank, shard_bytes) as train,
        ShardWriter(folder, SPLITS[1], workers.rank, shard_bytes) as heldout,
        (get_work_dir(folder) / f"rejected-{workers.rank:03d}.jsonl").open("w", encoding="utf-8") as rejected,
    ):
        writers = {SPLITS[0]: train, SPLITS[1]: heldout}
        for clip in pipeline.run(batches[workers.rank :: workers.world_size]):
            if clip.latents_CF is None:
                rejected.write(json.dumps({"source": clip.record["source"], "finding": clip.finding}) + "\n")
                rejected.flush()
            else:
                writers[clip.record["split"]].add(clip.latents_CF, clip.record)
    workers.wait()
    counted = {name: getattr(pipeline, name) for name in ("encoded", "reused", "seconds", "padding", "elapsed")}
    return EncodeResult(folder, **counted)


def _write_descriptions(source: str, folder: Path, plan: EncodePlan, encoder: Encoder, result: EncodeResult) -> None:
    """Write everything that describes the set; then delete what was set aside."""
    failed = _read_failures(folder)

    def add_failures(row: dict[str, Any]) -> dict[str, Any]:
        return row | {"findings": [*row["findings"], *failed.get(row["source"], [])]}

    failed_rows = (add_failures(plan.index.row(n)) for n, name in enumerate(plan.index.sources) if name in failed)
    dropped = int(plan.dropped.sum())
    count = _write_rejected(folder, itertools.chain(plan.iterate_rejected(), failed_rows)) - dropped
    applied = _list_applied(plan.settings)
    result.audit = write_audit_report(folder, source, map(add_failures, plan.index.iterate_rows()), applied)
    buffer = io.BytesIO()
    np.save(buffer, encoder.encode_silence(), allow_pickle=False)
    write_bytes(folder / SILENCE_FILE, buffer.getvalue())
    latent_settings = {name: value for name, value in plan.basis.items() if name != "autoencoder"}
    chosen = {name: getattr(plan.settings, name) for name in ("augmentations", "split", "duplicates", "captions")}
    described = {
        "made_by": f"sa3train {version('sa3train')}",
        "source": source,
        "rejected": count,
        "dropped_duplicates": dropped,
        "silence": {"file": SILENCE_FILE, "sha256": hashlib.sha256(buffer.getvalue()).hexdigest()},
    }
    result.index = build_index(folder, {"model": encoder.model, "settings": latent_settings | chosen}, described)
    write_card(folder, result.index, result.audit)
    remove_outdated(folder)
    for stale in folder.glob(f"*{STALE}"):
        stale.unlink()
    if count > plan.settings.max_rejected * len(plan.index):
        raise DataError(
            f"{count} of {len(plan.index)} clips are rejected, more than max_rejected={plan.settings.max_rejected:g} "
            f"allows. The others are encoded; see {folder / 'rejected.jsonl'}, fix them, and run the command again."
        )


def _read_failures(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Findings by source of what could not be encoded in this run, by any process."""
    failed: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(get_work_dir(folder).glob("rejected-*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            findings = failed.setdefault(row["source"], [])
            if row["finding"] not in findings:
                findings.append(row["finding"])
    return failed


def write_card(folder: Path, index: dict[str, Any], audit: AuditSummary) -> None:
    """Write `README.md` beside the shards: what the set is, how it was made, and how to use it.

    Args:
        folder: Folder of the shards.
        index: Content of `index.json`.
        audit: Counts of the audit.
    """
    template = Template(_CARD.read_text(encoding="utf-8"), keep_trailing_newline=True)
    write_text(folder / "README.md", template.render(index=index, findings=audit.findings))
